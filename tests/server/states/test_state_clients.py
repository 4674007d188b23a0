"""Our own client and commands on saved conversations, against a real server."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from clients.cli import chat_command
from clients.client import AsyncClient, Client
from clients.errors import BadRequestError, ConflictError, NotFoundError
from clients.state_cli import app, size_in_words
from clients.states import AsyncStates, States
from tests.server.states.running import ANN, BOB, Running

MESSAGES = [{"role": "user", "content": "What is the capital of France, and who lives there?"}]


def command(server: Running, *arguments: str, key: str = ANN) -> Result:
    return CliRunner().invoke(app, [*arguments, "--base-url", server.base_url, "--api-key", key])


def chat(server: Running, text: str, *arguments: str) -> Result:
    program = typer.Typer()
    program.command()(chat_command)
    options = ["--base-url", server.base_url, "--api-key", ANN, "--temperature", "0", "--max-tokens", "10"]
    return CliRunner().invoke(program, [*options, *arguments], input=text)


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    with Client(server.base_url, api_key=ANN, model="tiny", max_retries=0) as client:
        yield client


def test_the_client_saves_finds_and_goes_on(client: Client) -> None:
    states = States(client)
    client.chat(MESSAGES, temperature=0, max_tokens=8, return_state={"name": "client's"})
    found = states.find("client's")
    assert found is not None
    assert states.get(found.id) == found
    later = client.chat([{"role": "user", "content": "Go on."}], state_id=found.id, temperature=0, max_tokens=8)
    assert later.usage is not None
    assert later.usage.prompt_tokens > found.num_tokens
    assert found in states.list()
    assert states.find("nobody's") is None


def test_points_forks_and_files(client: Client) -> None:
    states = States(client)
    state = states.create(MESSAGES, name="with points")
    states.mark(state.id, "start")
    client.chat(MESSAGES, state_id=state.id, max_tokens=3, return_state={"update": True})
    fork = states.fork(state.id, name="the fork", point="start")
    assert fork.num_tokens == state.num_tokens
    assert states.rewind(state.id, "start").num_tokens == state.num_tokens
    content = states.export(state.id)
    assert len(content) == state.bytes
    copy = states.import_(content, name="the copy")
    assert states.export(copy.id) == content
    states.delete(copy.id)
    with pytest.raises(NotFoundError):
        states.get(copy.id)
    with pytest.raises(BadRequestError):
        states.import_(content[:-1])
    with pytest.raises(ConflictError):
        states.create(MESSAGES, name="with points")


def test_the_asynchronous_client_does_the_same(server: Running) -> None:
    async def run() -> None:
        async with AsyncClient(server.base_url, api_key=ANN, model="tiny") as client:
            states = AsyncStates(client)
            state = await states.create(MESSAGES, name="async")
            await states.mark(state.id, "here")
            fork = await states.fork(state.id, point="here")
            assert await states.find("async") == await states.get(state.id)
            assert (await states.rewind(state.id, "here")).id == state.id
            copy = await states.import_(await states.export(fork.id))
            assert {state.id, fork.id, copy.id} <= {item.id for item in await states.list()}
            await states.delete(copy.id)

    asyncio.run(run())


def test_states_at_the_command_line(server: Running, client: Client, tmp_path: Path) -> None:
    States(client).create(MESSAGES, name="for the shell")
    row = next(line for line in command(server, "list").stdout.splitlines() if "for the shell" in line)
    assert " kB " in row
    assert "for the shell" not in command(server, "list", key=BOB).stdout
    file = tmp_path / "state.safetensors"
    assert command(server, "export", "for the shell", str(file)).exit_code == 0
    exported = file.read_bytes()
    file.write_bytes(b"something else")
    refused = command(server, "export", "for the shell", str(file))
    assert (refused.exit_code, file.read_bytes()) == (1, b"something else")
    assert "--overwrite" in refused.stderr
    assert command(server, "export", "for the shell", str(file), "--overwrite").exit_code == 0
    assert file.read_bytes() == exported
    assert list(tmp_path.iterdir()) == [file]
    imported = command(server, "import", str(file), "--name", "came back")
    assert imported.stdout.startswith("state_")
    assert command(server, "point", "came back", "now").exit_code == 0
    forked = command(server, "fork", imported.stdout.strip(), "--name", "branched", "--point", "now")
    assert forked.stdout.startswith("state_")
    assert command(server, "rewind", "came back", "now").exit_code == 0
    assert command(server, "delete", "branched").exit_code == 0
    gone = command(server, "delete", "branched")
    assert (gone.exit_code, gone.stderr.strip()) == (1, "error: you have no state named 'branched'")


def test_sizes_are_written_as_on_the_page() -> None:
    assert [size_in_words(size) for size in (36_200, 999_999, 8_366_912)] == ["36.2 kB", "1,000.0 kB", "8.4 MB"]


def test_files_that_are_not_there_are_one_clear_line(server: Running, tmp_path: Path) -> None:
    missing = command(server, "import", str(tmp_path / "none"))
    assert (missing.exit_code, missing.stderr.count("\n")) == (1, 1)
    (tmp_path / "junk").write_bytes(b"junk")
    junk = command(server, "import", str(tmp_path / "junk"))
    assert junk.exit_code == 1
    assert "not a safetensors file" in junk.stderr


def test_a_chat_is_resumed_by_name_and_sends_only_what_is_new(server: Running, client: Client) -> None:
    first = chat(server, "What is the capital of France?\n", "--resume", "talk", "--system", "Be brief.")
    assert "talk: a new conversation" in first.stderr
    state = States(client).find("talk")
    assert state is not None
    fork = States(client).fork(state.id)
    before = server.gauge("dijiang_engine_prefill_tokens_total")
    second = chat(server, "And of Spain?\n", "--resume", "talk")
    assert f"talk: resumed after {state.num_tokens:,} tokens" in second.stderr
    now = States(client).get(state.id)
    assert now.num_tokens > state.num_tokens
    num_fed = server.gauge("dijiang_engine_prefill_tokens_total") - before
    assert num_fed < state.num_tokens
    question = [{"role": "user", "content": "And of Spain?"}]
    same = client.chat(question, state_id=fork.id, temperature=0, max_tokens=10)
    assert second.stdout == same.text + "\n"


def test_reset_forgets_at_the_server_too(server: Running, client: Client) -> None:
    chat(server, "One\n/reset\nTwo\n", "--resume", "fresh start")
    state = States(client).find("fresh start")
    assert state is not None
    chat(server, "Two\n", "--resume", "compared")
    compared = States(client).find("compared")
    assert compared is not None
    assert state.num_tokens == compared.num_tokens
