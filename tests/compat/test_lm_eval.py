"""lm-evaluation-harness, `local-completions`: its scores are those of the same model computed directly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dijiang_model.checkpoints import load_model
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.state import StateBuffer
from tests.compat.conftest import ENVIRONMENT, ROOT, Tiny, require, run_client
from tests.tiny_models import EOS_TOKEN_ID

pytestmark = pytest.mark.clients
TASKS = ROOT / "tests/compat/tasks"
TOLERANCE = 1e-4
"""Of a sum over some twenty tokens, in chunks and at once, in fp32."""
QUESTIONS = [
    {
        "question": f"Question {number}: naïve or wise?\nAnswer:",
        "endings": ["naïve", "wise", f"{number}", "東京 " * number],
        "label": number % 4,
    }
    for number in range(1, 9)
]


def log_probabilities(model: DiJiangForCausalLM, token_ids: list[int]) -> Tensor:
    """[T, vocab] of what follows each token, the whole text at once."""
    state = StateBuffer(model.state_spec, 2)
    state.storage.zero_()
    with torch.inference_mode():
        logits = model.prefill(
            torch.tensor(token_ids),
            lengths=[len(token_ids)],
            slots=torch.tensor([1]),
            starts=torch.tensor([0]),
            state=state,
        )
    return logits.log_softmax(dim=-1)


def score(model: DiJiangForCausalLM, context: str, ending: str) -> tuple[float, bool]:
    """Log-likelihood of an ending, and whether it is the greedy one. The tokenizer's tokens are bytes."""
    prompt, tokens = list(context.encode()), list(ending.encode())
    rows = log_probabilities(model, prompt + tokens)[len(prompt) - 1 : -1]
    return rows[range(len(tokens)), tokens].sum().item(), rows.argmax(dim=-1).tolist() == tokens


def answer(model: DiJiangForCausalLM, context: str, *, num_tokens: int) -> str:
    """The greedy answer, up to a line break."""
    tokens = list(context.encode())
    output: list[int] = []
    for _ in range(num_tokens):
        output.append(int(log_probabilities(model, tokens + output)[-1].argmax()))
        if output[-1] == EOS_TOKEN_ID:
            break
    text = bytes(token for token in output if token < 256).decode("utf-8", "replace")
    return text.split("\n")[0]


@pytest.fixture(scope="module")
def samples(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the harness recorded, by task."""
    lm_eval = require("bin/lm_eval")
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "choices.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    options = f"model={tiny.server.model},base_url={tiny.server.base_url}/v1/completions,num_concurrent=4,max_retries=1"
    command = [str(ENVIRONMENT / "bin/python"), str(lm_eval), "run", "--model", "local-completions"]
    command += ["--model_args", f"{options},tokenizer_backend=remote", "--include_path", str(TASKS)]
    command += ["--tasks", "tiny_choice,tiny_answer", "--log_samples", "--output_path", str(folder / "out")]
    run_client(command, home=folder)
    return {task: _read(folder, task) for task in ("tiny_choice", "tiny_answer")}


def _read(folder: Path, task: str) -> list[dict[str, Any]]:
    (file,) = folder.glob(f"out/**/samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> DiJiangForCausalLM:
    return load_model(tiny.folder)


def test_log_likelihoods_are_those_of_the_model(
    samples: dict[str, list[dict[str, Any]]], model: DiJiangForCausalLM
) -> None:
    assert len(samples["tiny_choice"]) == len(QUESTIONS)
    for sample in samples["tiny_choice"]:
        question, endings = sample["doc"]["question"], sample["doc"]["endings"]
        scores = [score(model, question, f" {ending}") for ending in endings]
        for (value, is_greedy), [[given, given_greedy]] in zip(scores, sample["resps"], strict=True):
            assert float(given) == pytest.approx(value, abs=TOLERANCE)
            assert str(given_greedy) == str(is_greedy)
        best = max(range(len(endings)), key=lambda number: scores[number][0])
        assert sample["acc"] == float(best == sample["doc"]["label"])


def test_generations_are_the_greedy_ones(samples: dict[str, list[dict[str, Any]]], model: DiJiangForCausalLM) -> None:
    assert len(samples["tiny_answer"]) == len(QUESTIONS)
    for sample in samples["tiny_answer"]:
        assert sample["resps"] == [[answer(model, sample["doc"]["question"], num_tokens=12)]]
