"""`dijiang score` and `dijiang selfcheck` against the real service with a tiny model."""

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.client import Client
from clients.scoring import score, summary
from clients.selfcheck import Finding, SelfCheck, largest_difference
from clients.states import States
from clients.types import Completion
from dijiang_model.batch import prefill
from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.serving.network import freeze
from dijiang_model.state import StateBuffer
from tests.e2e.serving import Server, serving
from tests.tiny_models import write_tiny_model
from tests.waiting import PATIENCE_S

TEXT = "naïve 東京, and so on. " * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(folder, "--states-folder", str(tmp_path_factory.mktemp("states"))) as running:
        yield running


def log_probability(folder: Path, text: str) -> float:
    """Of all bytes but the first, computed by the model directly."""
    model, tokens = freeze(load_model(folder)), list(text.encode())
    state = StateBuffer(model.state_spec, 2)
    state.storage.zero_()
    with torch.inference_mode():
        logits = prefill(
            model,
            torch.tensor(tokens),
            lengths=[len(tokens)],
            slots=torch.tensor([1]),
            starts=torch.tensor([0]),
            state=state,
        )
    return logits.log_softmax(dim=-1)[range(len(tokens) - 1), tokens[1:]].sum().item()


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_a_text_is_as_likely_as_the_model_finds_it(server: Server, folder: Path) -> None:
    with Client(server.base_url) as client:
        result = score(client, TEXT, model=server.model)
    expected = log_probability(folder, TEXT)
    assert (result.num_tokens, result.num_scored) == (len(TEXT.encode()), len(TEXT.encode()) - 1)
    assert result.log_probability == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(-expected / result.num_scored), rel=1e-4)
    # The tokenizer's tokens are bytes.
    assert result.bits_per_byte == pytest.approx(math.log2(result.perplexity), rel=1e-6)


def test_the_command_scores_files_and_pipes(server: Server, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    done = run("score", str(file), "-", "--base-url", server.base_url, "--json", stdin="x")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["log_probability"] == pytest.approx(log_probability(folder, TEXT), rel=1e-5)
    assert (second["num_tokens"], second["num_scored"], second["perplexity"]) == (1, 0, None)
    shown = run("score", str(file), "--base-url", server.base_url)
    assert "bits per byte" in shown.stdout


@pytest.mark.parametrize("content", [None, b"", b"\xff"])
def test_a_text_that_cannot_be_read_is_one_clear_line(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    done = run("score", str(file))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_sum_of_many_values_loses_nothing() -> None:
    entries = [("a", None), *(("b", -0.1 if number % 2 else -1e-17) for number in range(5_000))]
    assert summary(entries).log_probability == pytest.approx(-250.0, rel=1e-15)


def test_the_server_finds_itself_in_order(server: Server) -> None:
    done = run("selfcheck", server.base_url)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("largest difference: ")
    # fp32 on a CPU: far below the tolerance that weights in bfloat16 need.
    assert float(last.rpartition(" ")[2]) < 1e-4
    for name in ("decoded token by token", "many places", "piece by piece", "cached prefixes", "one prefill for two"):
        assert name in done.stdout
    assert "not possible" not in done.stdout
    with Client(server.base_url) as client:
        assert States(client).list() == ()


def test_more_than_the_tolerance_is_a_failure(server: Server) -> None:
    done = run("selfcheck", server.base_url, "--tolerance", "0")
    assert done.returncode in (0, 1)
    assert (done.returncode == 1) == ("error:" in done.stderr)
    assert largest_difference([Finding("a", 1, 0.1), Finding("b", 1, 0.2)]) == 0.2


class Drifting:
    """A client of a server whose decoding is off by a little: token n has the log-probability -n, and so on."""

    async def tokenize(self, text: str, *, model: str) -> tuple[int, ...]:
        return tuple(range(1, 9))

    async def complete(self, prompt: list[int], *, model: str, **options: Any) -> Completion:
        if options["max_tokens"] == 0:
            values = [None, *(-float(token) for token in prompt[1:])]
            logprobs: dict[str, Any] = {"token_logprobs": values, "tokens": [""] * len(values)}
        elif options["max_tokens"] == 1:
            (token,) = options["logprob_token_ids"]
            off = 0.5 if options["cache_prompt"] else 0.0
            logprobs = {"top_logprobs": [{f"token_id:{token}": off - token}]}
        else:
            tops = [{f"token_id:{token}": -0.25 - token} for token in range(20, 68)]
            logprobs = {"token_logprobs": [-0.25 - token for token in range(20, 68)], "top_logprobs": tops}
        choice = {"logprobs": logprobs, "token_ids": list(range(20, 68))}
        return Completion.model_validate({"choices": [choice]})


def test_a_server_that_computes_something_else_is_found_out() -> None:
    findings = asyncio.run(SelfCheck(Drifting(), "any").run())  # type: ignore[arg-type]
    assert {finding.name: finding.largest for finding in findings} == {
        "decoded token by token": 0.25,
        "read up to many places": 0.0,
        "read piece by piece into a state": 0.0,
        "read behind cached prefixes": 0.5,
        "read in a batch with others": 0.0,
        "decoded in a batch with others, one prefill for two": 0.25,
    }
