"""`python -m dijiang_model.hf MODULE ARGUMENTS`: runs a program of transformers' world that then knows our models."""

import runpy
import sys

import dijiang_model.hf  # noqa: F401  # registers them

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m dijiang_model.hf MODULE ARGUMENTS, e.g. lm_eval --model hf ...")
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
