"""What the pages' words stand for when their commands are run; and which are not run, each with its reason."""

import re
from collections.abc import Mapping

PREPARED: Mapping[str, Mapping[str, str]] = {
    "docs/comparison.md": {"SOURCE": "teacher", "HELD_OUT": "text"},
    "docs/memory.md": {"SOURCE": "teacher", "HELD_OUT": "text"},
    "docs/models.md": {"SOURCE": "teacher"},
    "docs/own-model.md": {"path/to/hf-folder": "teacher", "path/to/texts": "texts", "path/to/held-out": "text"},
    "docs/parallel.md": {"path/to/model": "model"},
    "docs/quantization.md": {"SOURCE": "teacher", "MODEL": "model"},
    "docs/training.md": {"SOURCE": "teacher", "TEXT": "text", "HELD_OUT": "text"},
}
"""By page: files and folders that its commands take for granted, and the tiny thing that stands there."""

ADDRESS = r"\b(127\.0\.0\.1|localhost|elsewhere):8000\b"
"""Where the pages' server listens; the test's one listens elsewhere."""

EARLIER_STATE = r"state_5f0c\.\.\."
"""Stands for the state that the command before has named."""

KEY_DIGEST = "sha256:HEX"

SMALLER: Mapping[str, str] = {
    r"dijiang convert .*--state-bytes": "--calibrate {text}",
    r"dijiang train": "--tokens 512 --sequence-length 64 --batch-size 2 --threads 1",
    r"dijiang evaluate": "--windows 1 --length 128 --facts 0 --threads 1",
    r"dijiang serve": "--threads 1 --no-states",
    r"dijiang bench decode": "--cases 1:16 --weights fp32 --rivals hf --rounds 1 --threads 1 {model}",
    r"dijiang bench serve": "--clients 1 --prompt-tokens 8 --tokens 4 --threads 1 {model}",
    r"python benchmarks/experiments/long_run\.py": "--tokens 200",
}
"""Options that are added to a command, so that it takes seconds: of two equal options the last one counts."""

TYPED: Mapping[str, str] = {r"dijiang chat": "My name is Ann.\n"}
"""What a command reads from its terminal before that ends."""

JAVASCRIPT = "tests/compat/test_sdks.py"
"""Runs the pages' JavaScript, with npm's packages; `make test-clients`."""

COLLECTED = r"-m pytest"
"""Tests that a page names are collected, not run: they run anyway."""

RUN_ELSEWHERE: Mapping[str, str] = {"docs/transformers.md": "tests/dijiang_model/hf/test_page.py"}
"""Pages whose Python another test runs."""

SKIPPED: Mapping[str, str] = {
    r"make (serve|test|install|check|docs|dist).*": "sets up an environment of its own, or runs this test",
    r"\.venv/bin/pre-commit install": "changes the hooks of the checkout",
    r"docker compose --profile cpu up .*": "needs a Docker engine; make test-docker",
    r"MODEL_FOLDER=\S+ docker compose .*": "needs a Docker engine and an NVIDIA GPU; make check reads its file",
    r"docker compose .*--profile (shared|observability|ui) .*": "needs images of a registry; make check reads its file",
    r"python -m dijiang_model\.hf lm_eval .*": "needs lm-evaluation-harness",
    r"dijiang ray deploy .*": "needs Ray; make test-ray",
    r"(kubectl|helm) .*": "needs a Kubernetes cluster; make test-chart",
    r"torchrun --nproc-per-node 4 .*": "needs four GPUs",
    r"dijiang serve path/to/model --tensor-parallel 2": "needs two CUDA devices; the next line does it on CPUs",
    r"py-spy .*": "needs py-spy, and the right to look into other processes",
    r"python -m benchmarks\.(gpu_all|gpu\.decode|gpu\.prefill) .*": "needs a GPU",
    r"pip install '?dijiang.*": "installs a package",
    r"(export DIJIANG_STATE_STORE=|dijiang serve /models/chat).*": "needs a PostgreSQL; tests/server/states starts one",
}
"""By the whole command, without its comment."""


def reason_to_skip(command: str) -> str | None:
    """None: it is run."""
    return next((reason for pattern, reason in SKIPPED.items() if re.fullmatch(pattern, bare(command))), None)


def bare(command: str) -> str:
    """Without its comment, and with single spaces."""
    return " ".join(command.partition(" #")[0].split())
