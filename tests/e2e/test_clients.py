"""The client and the terminal commands against the real service, with a tiny model."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from clients import errors
from clients.client import Client
from clients.types import Message
from tests.e2e.serving import Server, serving
from tests.tiny_models import write_tiny_model

MESSAGES: list[Message] = [{"role": "user", "content": "Hé?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with Client(server.base_url, model=server.model) as connected:
        yield connected


def test_the_server_is_there_and_says_so(client: Client, server: Server) -> None:
    assert client.is_ready()
    assert client.health().status == "ok"
    assert [model.id for model in client.models()] == [server.model]
    assert client.model(server.model).id == server.model


def test_text_and_tokens_go_both_ways(client: Client) -> None:
    tokens = client.tokenize("Hé 你好")
    assert len(tokens) > 0
    assert client.detokenize(tokens) == "Hé 你好"


def test_stream_and_whole_answer_agree(client: Client) -> None:
    whole = client.chat(MESSAGES, temperature=0, max_tokens=40)
    with client.stream_chat(MESSAGES, temperature=0, max_tokens=40) as stream:
        text = "".join(stream.text_stream)
    assert (text, stream.finish_reason, stream.usage) == (whole.text, whole.finish_reason, whole.usage)
    assert stream.usage is not None


def test_server_errors_arrive_typed(client: Client) -> None:
    with pytest.raises(errors.BadRequestError) as bad:
        client.complete("x", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(errors.NotFoundError) as missing:
        client.complete("x", model="no/such model")
    assert missing.value.code == "model_not_found"


def test_dijiang_complete_writes_what_the_server_answers(server: Server, client: Client) -> None:
    expected = client.complete("abc", temperature=0, max_tokens=20).text
    command = [sys.executable, "-m", "server", "complete", "--base-url", server.base_url, "--temperature", "0"]
    done = subprocess.run([*command, "--max-tokens", "20"], input=b"abc\n", capture_output=True, check=True)
    assert done.stdout.decode() == expected


def test_dijiang_chat_answers_a_pipe(server: Server, client: Client) -> None:
    expected = client.chat(MESSAGES, temperature=0, max_tokens=20).text
    command = [sys.executable, "-m", "server", "chat", "--base-url", server.base_url, "--temperature", "0"]
    done = subprocess.run([*command, "--max-tokens", "20"], input="Hé?\n".encode(), capture_output=True, check=True)
    assert done.stdout.decode() == expected + "\n"
