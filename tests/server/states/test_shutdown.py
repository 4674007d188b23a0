"""SIGTERM at a real server whose answers take longer than it may: their states are saved and gone on with exactly."""

import json
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server.states.running import ANN, BOB, Running, bearer, running, start
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.slow
LONG: dict[str, Any] = {"max_tokens": 100_000, "ignore_eos": True, "return_token_ids": True}
GREEDY, SEEDED = {"temperature": 0}, {"temperature": 1, "seed": 5}
TALK = [{"role": "user", "content": "Tell me about the sea."}]
SLOW = ("--max-conversations", "4")


@dataclass
class Asking(threading.Thread):
    """A client with one request under way; `lines` grow while it streams."""

    server: Running
    path: str
    body: dict[str, Any]
    key: str = ANN
    lines: list[str] = field(default_factory=list)
    status: int = 0
    headers: httpx.Headers = field(default_factory=httpx.Headers)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self.start()

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        with (
            httpx.Client(base_url=self.server.base_url, timeout=PATIENCE_S, trust_env=False) as http,
            http.stream("POST", self.path, json=self.body, headers=bearer(self.key)) as response,
        ):
            self.headers = response.headers
            self.lines += (line for line in response.iter_lines() if line)
            self.status = response.status_code

    def answer(self) -> dict[str, Any]:
        self.join(PATIENCE_S)
        return json.loads(self.lines[-1])  # type: ignore[no-any-return]

    def chunks(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """What was streamed before the error, and the error."""
        self.join(PATIENCE_S)
        assert self.lines[-1] == "data: [DONE]"
        *chunks, last = [json.loads(line.removeprefix("data: ")) for line in self.lines[:-1] if line[0] != ":"]
        return chunks, last["error"]


def tokens_of(chunks: list[dict[str, Any]]) -> list[int]:
    return [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0].get("text", "") for chunk in chunks)


@pytest.fixture
def first(tiny: Path, tmp_path: Path) -> Iterator[Running]:
    """A server that stops answering at once when it is told to."""
    server = start(tiny, tmp_path / "states", "--drain-timeout-s", "0.1", *SLOW)
    yield server
    server.kill()
    server.close()


def stop(server: Running) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_streams_name_the_state_from_which_the_rest_comes(
    first: Running, tiny: Path, tmp_path: Path, sampling: dict[str, Any]
) -> None:
    completion = Asking(first, "/v1/completions", {**LONG, **sampling, "prompt": "The sea", "stream": True})
    chat = Asking(first, "/v1/chat/completions", {**LONG, **sampling, "messages": TALK, "stream": True}, BOB)
    until(lambda: min(len(completion.lines), len(chat.lines)) > 40)
    stop(first)
    with running(tiny, tmp_path / "states") as again:
        for asking, key, path, begin, rest in (
            (completion, ANN, "/v1/completions", {"prompt": "The sea"}, {}),
            (chat, BOB, "/v1/chat/completions", {"messages": TALK}, {"messages": []}),
        ):
            chunks, error = asking.chunks()
            tokens = tokens_of(chunks)
            assert (error["code"], error["type"], error["param"]) == ("server_shutdown", "server_error", None)
            (choice,) = error["choices"]
            assert choice == {"index": 0, "state_id": error["state_id"], "completion_tokens": len(tokens)}
            assert error["state_id"] in error["message"]
            state = again.get(f"/v1/states/{error['state_id']}", key)
            assert 0 < state["expires_at"] - state["created_at"] <= 86_400
            assert again.refused("GET", f"/v1/states/{error['state_id']}", BOB if key == ANN else ANN)[0] == 404
            short = {**LONG, **sampling, "max_tokens": 30}
            after = again.post(path, key, **short, **rest, state_id=error["state_id"])
            whole = again.post(path, key, **{**short, "max_tokens": len(tokens) + 30}, **begin)
            assert tokens + after["choices"][0]["token_ids"] == whole["choices"][0]["token_ids"]
            assert after["usage"]["prompt_tokens"] == state["num_tokens"]
            assert after["usage"]["prompt_tokens_details"]["cached_tokens"] == state["num_tokens"] - 1


def test_whole_answers_come_as_an_error_with_the_text_so_far(first: Running, tiny: Path, tmp_path: Path) -> None:
    asking = Asking(first, "/v1/completions", {**LONG, **GREEDY, "prompt": "The sea", "n": 2, "seed": 1})
    until(lambda: first.gauge("dijiang_engine_decode_tokens_total") > 50)
    stop(first)
    error = asking.answer()["error"]
    assert (asking.status, error["code"], int(asking.headers["retry-after"])) == (503, "server_shutdown", 5)
    assert error["state_id"] is None
    assert [choice["index"] for choice in error["choices"]] == [0, 1]
    with running(tiny, tmp_path / "states") as again:
        for choice in error["choices"]:
            after = again.complete(None, state_id=choice["state_id"], max_tokens=20, return_token_ids=False)
            num_tokens = choice["completion_tokens"] + 20
            whole = again.complete("The sea", max_tokens=num_tokens)
            assert (choice["text"] + after["text"]).replace("\ufffd", "") == whole["text"].replace("\ufffd", "")
            assert choice["completion_tokens"] > 20


def test_the_official_client_sees_the_state(first: Running) -> None:
    stream = first.client.completions.create(
        model="tiny", prompt="The sea", stream=True, max_tokens=100_000, extra_body={"ignore_eos": True}
    )
    next(stream)
    first.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "server_shutdown"
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["state_id"].startswith("state_")


def test_what_was_not_begun_is_sent_again(first: Running) -> None:
    running_now = [Asking(first, "/v1/completions", {**LONG, "prompt": "x", "stream": True}) for _ in range(4)]
    until(lambda: all(len(asking.lines) > 2 for asking in running_now))
    waiting = Asking(first, "/v1/completions", {**LONG, "prompt": "waits"})
    until(lambda: first.gauge("dijiang_num_requests_waiting") == 1)
    stop(first)
    error = waiting.answer()["error"]
    assert (waiting.status, error["code"], error["state_id"]) == (503, "server_shutdown", None)
    assert "send the request again" in error["message"]
    assert int(waiting.headers["retry-after"]) > 0
    assert all(asking.chunks()[1]["state_id"] for asking in running_now)


def test_a_form_cannot_be_gone_on_with_by_a_client(first: Running) -> None:
    asking = Asking(
        first, "/v1/completions", {**LONG, "prompt": "x", "stream": True, "structured_outputs": {"regex": "[a-z]*"}}
    )
    until(lambda: len(asking.lines) > 10)
    stop(first)
    assert asking.chunks()[1]["choices"][0]["state_id"] is None


def test_a_state_that_was_to_be_advanced_is_not_advanced_by_half_an_answer(
    first: Running, tiny: Path, tmp_path: Path
) -> None:
    base = first.post("/v1/states", prompt="The sea", name="sea")
    body = {**LONG, "prompt": " is", "state_id": base["id"], "return_state": {"update": True}, "stream": True}
    asking = Asking(first, "/v1/completions", body)
    until(lambda: len(asking.lines) > 10)
    stop(first)
    with running(tiny, tmp_path / "states") as again:
        half = again.get(f"/v1/states/{asking.chunks()[1]['state_id']}")
        assert again.get(f"/v1/states/{base['id']}")["num_tokens"] == base["num_tokens"]
        assert (half["parent_id"], half["name"]) == (base["id"], None)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_and_leaves_nothing_half(
    tiny: Path, tmp_path: Path, second: signal.Signals
) -> None:
    server = start(tiny, tmp_path / "states", "--drain-timeout-s", "600", *SLOW)
    try:
        kept = server.post("/v1/states", prompt="Kept")["id"]
        asking = Asking(server, "/v1/completions", {**LONG, "prompt": "x", "stream": True})
        until(lambda: len(asking.lines) > 10)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.http.get("/ready").status_code == 503)
        server.process.send_signal(second)
        assert server.process.wait(PATIENCE_S) == 0
    finally:
        server.kill()
        server.close()
    with running(tiny, tmp_path / "states") as again:
        assert [state["id"] for state in again.get("/v1/states")["data"]] == [kept]
        assert len([*(tmp_path / "states" / "files").iterdir()]) == 1


def test_without_room_for_states_the_server_ends_all_the_same(tiny: Path, tmp_path: Path) -> None:
    options = ("--drain-timeout-s", "0.1", "--states-disk", "1KiB", "--states-eviction", "refuse", *SLOW)
    server = start(tiny, tmp_path / "states", *options)
    try:
        asking = Asking(server, "/v1/completions", {**LONG, "prompt": "x", "stream": True})
        until(lambda: len(asking.lines) > 10)
        stop(server)
        error = asking.chunks()[1]
        assert (error["code"], error["state_id"]) == ("server_shutdown", None)
    finally:
        server.kill()
        server.close()


@pytest.mark.parametrize(
    ("messages", "turn"), [([], "closed"), ([], "ended")], ids=["after whole messages", "after a complete answer"]
)
def test_there_must_be_an_answer_to_go_on_with(server: Running, messages: list[Any], turn: str) -> None:
    if turn == "closed":
        state_id = server.post("/v1/states", messages=TALK)["id"]
    else:
        bias = {str(258): 100}  # the end of the turn
        state_id = server.chat(("user", "x"), return_state=True, logit_bias=bias)["state_id"]
    body = {"messages": messages, "state_id": state_id}
    assert server.refused("POST", "/v1/chat/completions", json=body) == (400, "invalid_value", "messages")
    assert server.refused("POST", "/v1/chat/completions", json={"messages": []}) == (400, "invalid_value", "messages")
