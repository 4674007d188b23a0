"""Decode steps of one conversation beside llama.cpp's alone: `dijiang bench decode --rivals llama.cpp`.

pip install 'dijiang[bench]'
python benchmarks/experiments/versus_llama_cpp.py --threads 1
"""

import sys

import typer

from benchmarks.decode import decode_command

if __name__ == "__main__":
    sys.argv[1:1] = ["--rivals", "llama.cpp", "--cases", "1:128,1:4096"]
    typer.run(decode_command)
