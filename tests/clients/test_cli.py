"""`dijiang chat` and `dijiang complete` in pipes."""

import socket
import subprocess
import sys
from collections.abc import Callable

import pytest
import typer
from typer.testing import CliRunner, Result

from clients import exchange as exchange_module
from clients.cli import BROKEN_PIPE, chat_command, complete_command
from tests.clients import answers
from tests.clients.loopback import Exchange, loopback_server
from tests.waiting import PATIENCE_S


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "INITIAL_DELAY_S", 0.0)
    for name in ("DIJIANG_BASE_URL", "DIJIANG_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def run(command: Callable[..., None], *arguments: str, stdin: str | bytes = "") -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, arguments, input=stdin)


def _serve(exchange: Exchange) -> None:
    if exchange.path == "/v1/completions":
        exchange.stream(answers.completion(" Par"), answers.completion("is\n"), answers.completion("", "stop"))
    else:
        answers.echo(exchange)


def test_complete_reads_stdin_and_writes_exactly_the_continuation() -> None:
    with loopback_server(_serve) as server:
        result = run(complete_command, "--base-url", server.url, stdin="The capital of France is\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, " Paris\n", "")
    body = server.requests[1].body
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("tiny", "The capital of France is", 128)
    assert {"temperature", "stop", "ignore_eos", "seed"}.isdisjoint(body)


def test_complete_options_reach_the_server_falsy_ones_too() -> None:
    options = ["--temperature", "0", "--seed", "0", "--top-p", "0.5", "--max-tokens", "1", "--ignore-eos"]
    with loopback_server(_serve) as server:
        run(
            complete_command,
            *["--base-url", server.url, "--model", "other", "--api-key", "k", "--stop", "a", "--stop", "b", *options],
            stdin="x\n\n",
        )
    body = server.requests[0].body
    assert body["prompt"] == "x\n", "only the last line break goes"
    assert (body["temperature"], body["seed"], body["top_p"], body["max_tokens"]) == (0, 0, 0.5, 1)
    assert (body["stop"], body["ignore_eos"], body["model"]) == (["a", "b"], True, "other")
    assert server.requests[0].headers["authorization"] == "Bearer k"


def test_environment_names_the_server_and_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with loopback_server(_serve) as server:
        monkeypatch.setenv("DIJIANG_BASE_URL", server.url + "/v1")
        monkeypatch.setenv("DIJIANG_API_KEY", "from-env")
        assert run(complete_command, stdin="x").exit_code == 0
    assert server.requests[0].headers["authorization"] == "Bearer from-env"


def test_piped_chat_answers_each_line_and_nothing_else() -> None:
    with loopback_server(_serve) as server:
        result = run(chat_command, "--base-url", server.url, stdin="one\n\ntwo\n/system Be kind.\n /three")
    assert (result.exit_code, result.stdout) == (0, "You said: one\nYou said: two\nYou said: /three\n")
    messages = server.requests[-1].body["messages"]
    assert [message["content"] for message in messages] == [
        "Be kind.",
        "one",
        "You said: one",
        "two",
        "You said: two",
        "/three",
    ]


def test_piped_chat_passes_on_control_characters() -> None:
    text = "a\rb\x07c\x1b[1m[bold]\u2028"
    with loopback_server(lambda exchange: exchange.stream(*answers.chat_chunks(text))) as server:
        result = run(chat_command, "--base-url", server.url, "--model", "tiny", stdin="x")
    assert result.stdout_bytes.decode() == text + "\n"


@pytest.mark.parametrize("command", [chat_command, complete_command])
def test_server_that_is_not_there_is_told_with_a_remedy(command: Callable[..., None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    result = run(command, "--base-url", url, stdin="x")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"no answer from {url}" in result.stderr
    assert "make serve" in result.stderr


@pytest.mark.parametrize("command", [chat_command, complete_command])
def test_server_error_in_a_pipe_ends_the_program(command: Callable[..., None]) -> None:
    with loopback_server(lambda exchange: exchange.answer(401, answers.error("wrong key"))) as server:
        result = run(command, "--base-url", server.url, "--model", "tiny", stdin="x\ny\n")
    assert (result.exit_code, result.stdout.strip()) == (1, "")
    assert "error: wrong key" in result.stderr
    assert len(server.requests) == 1


def test_server_without_models_is_told() -> None:
    with loopback_server(lambda exchange: exchange.answer(200, {"data": []})) as server:
        result = run(complete_command, "--base-url", server.url, stdin="x")
    assert (result.exit_code, "serves no model" in result.stderr) == (1, True)


def test_address_that_is_none_is_a_usage_error() -> None:
    result = run(chat_command, "--base-url", "nonsense")
    assert result.exit_code == 2
    assert "--base-url" in result.stderr


def test_stdin_that_is_not_text_is_told() -> None:
    result = run(complete_command, stdin=b"abc\xff")
    assert (result.exit_code, "not UTF-8 (byte 3)" in result.stderr) == (1, True)


def test_reader_that_goes_away_ends_complete_quietly_and_cancels_the_request() -> None:
    def handle(exchange: Exchange) -> None:
        exchange.start_stream()
        try:
            while True:
                exchange.send(b'data: {"choices":[{"text":"more and more "}]}\n\n')
        except ConnectionError:
            exchange.handler.close_connection = True
            server.disconnected.set()

    program = "import typer; from clients.cli import complete_command; typer.run(complete_command)"
    with (
        loopback_server(handle) as server,
        subprocess.Popen(
            [sys.executable, "-c", program, "--base-url", server.url, "--model", "tiny"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.close()
        assert process.stdout.read(4) == b"more"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE_S) == BROKEN_PIPE
        assert server.disconnected.wait(PATIENCE_S)
