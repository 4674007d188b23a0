"""However a request ends, its slots are free: disconnects in every phase, engine failures, deadlines."""

import json
import socket
import threading
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from server.engine.types.requests import EngineError, FinishReason
from server.options import ServiceOptions
from server.text.tokenizer import Tokenizer
from tests.server.conftest import Loopback, serve
from tests.server.fake_engine import ANSWER, FakeEngine, answer_tokens

MODEL = "org/tiny"
BODY = {"prompt": "x", "max_tokens": 1000}


def assert_all_aborted(server: Loopback, count: int) -> None:
    server.wait_until(lambda: len(server.engine.ended) == count)
    assert set(server.engine.ended.values()) == {FinishReason.ABORT}
    server.wait_until(lambda: server.service.num_active == 0)
    server.engine.hold_after, server.engine.script = None, answer_tokens
    answer = server.openai.completions.create(model=MODEL, prompt="x", max_tokens=3)
    assert answer.choices[0].text == ANSWER[:3]


def leave(server: Loopback, body: dict[str, Any], *, after_chunks: int) -> None:
    """Reads that many chunks of a stream and goes."""
    with (
        httpx.Client(trust_env=False, verify=False) as client,
        client.stream("POST", f"{server.url}/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        for _ in range(after_chunks):
            next(lines)


@pytest.mark.parametrize("hold_after", [0, 1, 10, len(ANSWER.encode())])
def test_a_disconnect_while_streaming_frees_every_slot(server: Loopback, hold_after: int) -> None:
    server.engine.hold_after = hold_after
    server.engine.script = lambda _: b"a" * 100
    leave(server, BODY | {"stream": True, "n": 3}, after_chunks=min(hold_after, 2))
    assert_all_aborted(server, 3)


@pytest.mark.parametrize("hold_after", [0, 5])
def test_a_disconnect_while_waiting_for_the_whole_answer_frees_every_slot(server: Loopback, hold_after: int) -> None:
    server.engine.hold_after = hold_after
    body = json.dumps(BODY | {"n": 2}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + head + body)
        server.wait_until(lambda: len(server.engine.running) == 2)
    assert_all_aborted(server, 2)


def test_many_disconnects_at_once_free_every_slot(server: Loopback) -> None:
    server.engine.hold_after = 3
    threads = [
        threading.Thread(target=leave, args=(server, BODY | {"stream": True}), kwargs={"after_chunks": 1})
        for _ in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_all_aborted(server, 40)


def test_an_engine_that_dies_before_the_answer_is_a_503_with_retry_after(server: Loopback) -> None:
    server.engine.fail_after = 4
    with pytest.raises(openai.InternalServerError) as caught:
        server.openai.completions.create(model=MODEL, prompt="x")
    assert (caught.value.status_code, caught.value.code) == (503, "engine_restarting")
    assert caught.value.response.headers["retry-after"].isdigit()
    assert set(server.engine.ended.values()) == {FinishReason.ERROR}


def test_a_numerical_error_is_a_500_of_one_request(server: Loopback) -> None:
    server.engine.fail_after = 0
    server.engine.error = EngineError("numerical_error", "the state of this request is not finite")
    with pytest.raises(openai.InternalServerError) as caught:
        server.openai.completions.create(model=MODEL, prompt="x")
    assert (caught.value.status_code, caught.value.code) == (500, "numerical_error")


def test_after_the_200_an_error_is_an_event_and_done_follows(server: Loopback) -> None:
    server.engine.fail_after = 2
    answer = server.http.post("/v1/completions", json=BODY | {"stream": True})
    assert answer.status_code == 200
    *chunks, error, done, end = answer.text.split("\n\n")
    assert [json.loads(chunk.removeprefix("data: "))["choices"][0]["text"] for chunk in chunks] == ["T"]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_restarting"
    assert (done, end) == ("data: [DONE]", "")
    with pytest.raises(openai.APIError, match="died"):
        list(server.openai.completions.create(model=MODEL, prompt="x", stream=True))


def test_one_failing_choice_ends_the_others(server: Loopback) -> None:
    server.engine.script = lambda request: b"ab" if request.prompt_token_ids == (97,) else [b"b"[0]] * 50
    server.engine.fail_after = 20
    answer = server.http.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 60})
    assert answer.status_code == 503
    server.wait_until(lambda: not server.engine.running)


def test_a_full_server_is_a_503_before_anything_is_sent(server: Loopback) -> None:
    server.engine.capacity = 2
    for stream in (False, True):
        answer = server.http.post("/v1/completions", json=BODY | {"n": 3, "stream": stream})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
    server.wait_until(lambda: not server.engine.running)
    assert server.service.num_active == 0


def test_a_timeout_of_the_request_is_a_504_that_says_do_not_retry(server: Loopback) -> None:
    server.engine.hold_after = 3
    answer = server.http.post("/v1/completions", json=BODY | {"timeout": 0.05})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert answer.headers["x-should-retry"] == "false"
    streamed = server.http.post("/v1/completions", json=BODY | {"timeout": 0.5, "stream": True})
    assert streamed.text.count("timeout_error") == 1
    assert streamed.text.endswith("data: [DONE]\n\n")


def test_a_silent_stream_is_kept_open_by_comments(byte_tokenizer: Tokenizer, options: ServiceOptions) -> None:
    engine = FakeEngine(hold_after=2)
    with serve(engine, replace(options, keepalive_s=0.02), byte_tokenizer) as server:
        with server.http.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer:
            lines = (line for line in answer.iter_lines() if line)
            seen = [next(lines) for _ in range(5)]
        server.wait_until(lambda: not engine.running)
    data = [line for line in seen if line.startswith("data: ")]
    assert len(data) == 2
    assert [line for line in seen if line not in data] == [": keep-alive"] * 3


def test_a_request_while_the_engine_restarts_is_a_503_and_the_next_one_works(server: Loopback) -> None:
    server.engine.status = "restarting"
    with pytest.raises(openai.InternalServerError) as caught:
        server.openai.completions.create(model=MODEL, prompt="x")
    assert (caught.value.status_code, caught.value.code) == (503, "engine_restarting")
    assert server.http.get("/health").json()["status"] == "restarting"
    server.engine.status = "ready"
    assert server.openai.completions.create(model=MODEL, prompt="x", max_tokens=1).choices[0].text == "T"
