"""lm-evaluation-harness against a running server, and the same log-probabilities by the model itself."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dijiang_model.serving.network import FrozenModel
from tests.compat.conftest import ROOT, require, run_client
from tests.e2e.serving import Server
from tests.read_at_once import log_probabilities

TASKS = ROOT / "tests/compat/tasks"
Samples = dict[str, list[dict[str, Any]]]


def recorded(server: Server, folder: Path, questions: Sequence[dict[str, Any]]) -> Samples:
    """What the harness records of its two tasks, with the tokenizer that the server tells it of.

    Args:
        folder: for its files.
        questions: `{"question", "endings", "label"}` each.
    """
    lm_eval = require("lm-eval", "bin/lm_eval")
    (folder / "choices.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    options = f"model={server.model},base_url={server.base_url}/v1/completions,num_concurrent=4,max_retries=1"
    command = [str(lm_eval.with_name("python")), str(lm_eval), "run", "--model", "local-completions"]
    command += ["--model_args", f"{options},tokenizer_backend=remote", "--include_path", str(TASKS)]
    command += ["--tasks", "tiny_choice,tiny_answer", "--log_samples", "--output_path", str(folder / "out")]
    run_client(command, home=folder)
    return {task: _read(folder, task) for task in ("tiny_choice", "tiny_answer")}


def _read(folder: Path, task: str) -> list[dict[str, Any]]:
    (file,) = folder.glob(f"out/**/samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def likelihood(model: FrozenModel, prompt: list[int], ending: list[int]) -> tuple[float, bool]:
    """Log-likelihood of an ending, and whether it is the greedy one."""
    rows = log_probabilities(model, prompt + ending)[len(prompt) - 1 : -1]
    return rows[range(len(ending)), ending].sum().item(), rows.argmax(dim=-1).tolist() == ending


def greedy(model: FrozenModel, prompt: list[int], *, num_tokens: int, ends: frozenset[int]) -> list[int]:
    """The most likely tokens one after the other, up to an end."""
    output: list[int] = []
    while len(output) < num_tokens:
        token = int(log_probabilities(model, prompt + output)[-1].argmax())
        if token in ends:
            break
        output.append(token)
    return output
