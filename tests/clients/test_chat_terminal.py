"""`dijiang chat` at a real (pseudo-)terminal."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.clients import answers
from tests.clients.loopback import Exchange, Handler, LoopbackServer, loopback_server
from tests.clients.terminal_session import CTRL_D, TerminalSession, at_terminal
from tests.waiting import PATIENCE_S

PROMPT = "you> "


@contextmanager
def talking(handle: Handler) -> Iterator[tuple[LoopbackServer, TerminalSession]]:
    """A server and `dijiang chat` with it, which asks for the first line."""
    with (
        loopback_server(handle) as server,
        at_terminal(["chat", "--base-url", server.url, "--model", "tiny"]) as terminal,
    ):
        terminal.read_until(PROMPT)
        yield server, terminal


def test_conversation_keeps_its_history_and_obeys_commands(tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    with (
        loopback_server(answers.echo) as server,
        at_terminal(
            ["chat", "--system", "Be brief.", "--temperature", "0"], {"DIJIANG_BASE_URL": server.url}
        ) as terminal,
    ):
        assert "tiny at http://127.0.0.1" in terminal.read_until(PROMPT)
        terminal.type("one\n")
        assert "You said: one" in terminal.read_until(PROMPT)
        terminal.type("two\n")
        assert "You said: two" in terminal.read_until(PROMPT)
        terminal.type(f"/save {saved}\n")
        assert "saved to" in terminal.read_until(PROMPT)
        terminal.type("/reset\n/system Be long.\n/help\n")
        terminal.read_until("/exit")
        terminal.type("three\n")
        terminal.read_until("You said: three")
        terminal.type("/system\nfour\n")
        terminal.read_until("You said: four")
        terminal.type("/exit\n")
        assert terminal.wait() == 0
    bodies = [exchange.body for exchange in server.requests[1:]]
    turns = [[message["content"] for message in body["messages"]] for body in bodies]
    assert turns == [
        ["Be brief.", "one"],
        ["Be brief.", "one", "You said: one", "two"],
        ["Be long.", "three"],
        ["three", "You said: three", "four"],
    ]
    assert [message["role"] for message in bodies[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert (bodies[0]["model"], bodies[0]["temperature"]) == ("tiny", 0)
    assert [message["content"] for message in json.loads(saved.read_text())] == [*turns[1], "You said: two"]


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    stopped = threading.Event()

    def handle(exchange: Exchange) -> None:
        if len(server.requests) > 1:
            answers.echo(exchange)
            return
        exchange.start_stream()
        exchange.send(b'data: {"choices":[{"delta":{"content":"begun"}}]}\n\n')
        exchange.wait_for_disconnect()
        stopped.set()

    with talking(handle) as (server, terminal):
        terminal.type("one\n")
        terminal.read_until("begun")
        terminal.interrupt_until("(stopped)")
        assert stopped.wait(PATIENCE_S), "stopping an answer must close its connection"
        terminal.read_until(PROMPT)
        terminal.type("half a li")
        terminal.read_until("half a li")
        terminal.interrupt_until("(/exit or Ctrl-D to leave)")
        terminal.read_until(PROMPT)
        terminal.type("two\n")
        terminal.read_until("You said: two")
        terminal.read_until(PROMPT)
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
    contents = [message["content"] for message in server.requests[1].body["messages"]]
    assert contents == ["one", "begun", "two"], "what was said before the stop is remembered"


def test_failed_turn_is_told_and_forgotten_and_the_program_goes_on(tmp_path: Path) -> None:
    diary = tmp_path / "diary.txt"
    diary.write_text("Dear diary")

    def handle(exchange: Exchange) -> None:
        if len(server.requests) == 1:
            exchange.answer(400, answers.error("prompt has 9,311 tokens", param="messages"))
        else:
            exchange.stream(*answers.chat_chunks("fine\x1b[2J"))

    with talking(handle) as (server, terminal):
        terminal.type("too long\n")
        assert "error: prompt has 9,311 tokens" in terminal.read_until(PROMPT)
        terminal.type("short\n")
        assert "fine\N{REPLACEMENT CHARACTER}[2J" in terminal.read_until(PROMPT), "an answer cannot steer the terminal"
        terminal.type("/nonsense\n")
        assert "no command /nonsense" in terminal.read_until(PROMPT)
        terminal.type("/save\n")
        assert "needs a file name" in terminal.read_until(PROMPT)
        terminal.type("/save /nowhere/at/all\n")
        assert "cannot write" in terminal.read_until(PROMPT)
        terminal.type(f"/save {diary}\n")
        assert "it exists and holds no saved conversation" in terminal.read_until(PROMPT)
    assert diary.read_text() == "Dear diary"
    assert server.requests[1].body["messages"] == [{"role": "user", "content": "short"}]


def test_a_model_without_a_chat_template_has_another_command() -> None:
    def refuse(exchange: Exchange) -> None:
        exchange.answer(400, answers.error("this model has no chat template", code="no_chat_template"))

    with talking(refuse) as (_, terminal):
        terminal.type("Hello\n")
        assert "| dijiang complete" in terminal.read_until(PROMPT)


def _thinking_server(exchange: Exchange) -> None:
    thought = [answers.chat_chunk({"reasoning_content": piece, "reasoning": piece}) for piece in ("Let me", " see.")]
    first, *others = answers.chat_chunks("It is 4.")
    exchange.stream(first, *thought, *others)


def test_what_is_thought_is_dimmed_and_not_kept() -> None:
    with talking(_thinking_server) as (server, terminal):
        terminal.type("2+2?\n")
        assert "Let me see.\r\n\r\nIt is 4." in terminal.read_until(PROMPT)
        terminal.type("sure?\n")
        terminal.read_until(PROMPT)
    assert "\x1b[2mLet me" in terminal.raw
    assert "\x1b[2mIt is 4." not in terminal.raw
    assert server.requests[1].body["messages"][1] == {"role": "assistant", "content": "It is 4."}


def test_a_pipe_gets_the_answer_without_the_thought() -> None:
    with loopback_server(_thinking_server) as server:
        program = "import typer; from clients.cli import chat_command; typer.run(chat_command)"
        command = [sys.executable, "-c", program, "--base-url", server.url, "--model", "tiny"]
        done = subprocess.run(command, input="2+2?\n", capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout == "It is 4.\n"


def test_what_is_pasted_is_one_message_and_several_lines_can_be_typed() -> None:
    with talking(answers.echo) as (server, terminal):
        terminal.type("\x1b[200~one\ntwo\nthree\x1b[201~\r")
        terminal.read_until("You said: one")
        terminal.read_until(PROMPT)
        terminal.type("four\x1b\rfive\r")
        terminal.read_until("You said: four")
        terminal.read_until(PROMPT)
        terminal.type("six\\\r")
        terminal.read_until("...> ")
        terminal.type("seven\r")
        terminal.read_until("You said: six")
    bodies = [exchange.body for exchange in server.requests]
    assert [body["messages"][-1]["content"] for body in bodies] == ["one\ntwo\nthree", "four\nfive", "six\nseven"]
