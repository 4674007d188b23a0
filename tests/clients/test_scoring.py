"""`dijiang score` and `dijiang selfcheck` against the real service with a tiny model."""

import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from clients.client import Client
from clients.measuring_cli import selfcheck_command
from clients.scoring import score, summary
from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.serving.network import freeze
from tests.clients.loopback import Exchange, loopback_server
from tests.clients.terminal_session import at_terminal
from tests.e2e.serving import Server, serving
from tests.read_at_once import log_probabilities
from tests.tiny_models import write_tiny_model
from tests.waiting import PATIENCE_S

TEXT = "naïve 東京, and so on. " * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, "--admin-keys", "key-of-admin") as running:
        yield running


def log_probability(folder: Path, text: str) -> float:
    """Of all bytes but the first, computed by the model directly."""
    model, tokens = freeze(load_model(folder)), list(text.encode())
    return log_probabilities(model, tokens)[range(len(tokens) - 1), tokens[1:]].sum().item()


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
    done = run("selfcheck", server.base_url, "--api-key", "key-of-admin")
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("largest difference: ")
    # fp32 on a CPU: far below the tolerance that weights in bfloat16 need.
    assert float(last.rpartition(" ")[2]) < 1e-4
    for name in ("decoded token by token", "many places", "chunks of 31", "cached prefixes", "one prefill for two"):
        assert name in done.stdout
    assert "not possible" not in done.stdout


def test_more_than_the_tolerance_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    finding = {"name": "decoded token by token", "num_values": 48, "largest_difference": 0.25}
    nothing = {"name": "read behind cached prefixes", "num_values": 0, "largest_difference": 0.0}
    report = {"passed": False, "tolerance": 0.1, "largest_difference": 0.25, "findings": [finding, nothing]}
    with loopback_server(lambda exchange: exchange.answer(200, json.dumps(report))) as remote:
        with pytest.raises(typer.Exit) as ended:
            selfcheck_command(remote.url, tolerance=0.1)
        assert (remote.requests[0].path, remote.requests[0].body) == ("/admin/selfcheck", {"tolerance": 0.1})
    assert ended.value.exit_code == 1
    shown = capsys.readouterr()
    assert "2.50e-01" in shown.out
    assert "not possible here" in shown.out
    assert "that is more than 0.1" in shown.err


def test_at_a_terminal_what_takes_its_time_says_so() -> None:
    report = {"passed": True, "tolerance": 0.1, "largest_difference": 0.0, "findings": []}
    is_seen = threading.Event()

    def hold(exchange: Exchange) -> None:
        assert is_seen.wait(PATIENCE_S)
        exchange.answer(200, json.dumps(report))

    with loopback_server(hold) as remote, at_terminal(["selfcheck", remote.url]) as terminal:
        terminal.read_until("the server checks itself 0:00:0")
        is_seen.set()
        terminal.read_until("largest difference: 0.00e+00")
        assert terminal.wait() == 0


def test_without_an_admin_key_it_is_one_clear_line(server: Server) -> None:
    done = run("selfcheck", server.base_url)
    assert done.returncode == 1
    assert "an admin key is needed" in done.stderr
    assert "Traceback" not in done.stderr
