"""Requests go out as OpenAI's API has them, and answers come back typed, from both clients."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from clients.client import AsyncClient, Client
from clients.errors import APIConnectionError, APIResponseError, APITimeoutError, StreamError
from clients.types import Model, Usage
from tests.clients import answers
from tests.clients.drivers import Driver
from tests.clients.loopback import Exchange, loopback_server
from tests.waiting import PATIENCE_S

Connect = Callable[..., Driver]


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_base_url_works_with_and_without_v1(connect: Connect, suffix: str) -> None:
    with loopback_server(lambda exchange: exchange.answer(200, answers.MODELS)) as server:
        models = connect(server.url + suffix).call("models")
    assert models == (Model.model_validate(answers.MODELS["data"][0]),)
    assert server.requests[0].path == "/v1/models"


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://"])
def test_base_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="base_url must look like"):
        Client(url)


def test_key_and_headers_are_sent(connect: Connect) -> None:
    with loopback_server(lambda exchange: exchange.answer(200, answers.MODELS)) as server:
        connect(server.url, api_key="secret", headers={"x-team": "blue"}).call("models")
        connect(server.url).call("models")
    assert server.requests[0].headers["authorization"] == "Bearer secret"
    assert server.requests[0].headers["x-team"] == "blue"
    assert "authorization" not in server.requests[1].headers


def test_completion_request_holds_what_was_given_and_nothing_else(connect: Connect) -> None:
    answer = answers.completion(" Paris", "length", usage=answers.USAGE)
    with loopback_server(lambda exchange: exchange.answer(200, answer)) as server:
        completion = connect(server.url, model="tiny").call("complete", "The capital", temperature=0, seed=0, stop=[])
    assert (completion.text, completion.finish_reason) == (" Paris", "length")
    assert completion.usage == Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5)
    assert server.requests[0].body == {
        "model": "tiny",
        "prompt": "The capital",
        "temperature": 0,
        "seed": 0,
        "stop": [],
    }


@pytest.mark.parametrize("prompt", [["a", "b"], [1, 2], [[1], [2, 3]]])
def test_all_prompt_forms_are_passed_on(connect: Connect, prompt: object) -> None:
    with loopback_server(lambda exchange: exchange.answer(200, answers.completion("x", "stop"))) as server:
        connect(server.url).call("complete", prompt, model="tiny")
    assert server.requests[0].body["prompt"] == prompt


def test_chat_gives_the_text_of_the_first_choice(connect: Connect) -> None:
    with loopback_server(lambda exchange: exchange.answer(200, answers.chat("Hello", answers.USAGE))) as server:
        answer = connect(server.url, model="tiny").call("chat", [{"role": "user", "content": "Hi"}])
    assert (answer.text, answer.finish_reason, answer.choices[0].message.role) == ("Hello", "stop", "assistant")
    assert server.requests[0].body == {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def test_a_call_without_any_model_says_so(connect: Connect) -> None:
    with pytest.raises(ValueError, match="name a model"):
        connect("http://127.0.0.1:9").call("complete", "x")


def test_model_ids_may_hold_slashes_and_spaces(connect: Connect) -> None:
    with loopback_server(lambda exchange: exchange.answer(200, {"id": "a/b c"})) as server:
        assert connect(server.url).call("model", "a/b c").id == "a/b c"
    assert server.requests[0].path == "/v1/models/a/b%20c"


def test_tokenize_and_detokenize(connect: Connect) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.answer(200, {"tokens": [1, 2], "count": 2} if exchange.path == "/tokenize" else {"prompt": "ab"})

    with loopback_server(handle) as server:
        driver = connect(server.url + "/v1", model="tiny")
        assert driver.call("tokenize", "ab", add_special_tokens=False) == (1, 2)
        assert driver.call("detokenize", (1, 2)) == "ab"
    assert server.requests[0].body == {"model": "tiny", "prompt": "ab", "add_special_tokens": False}
    assert server.requests[1].body == {"model": "tiny", "tokens": [1, 2]}


def test_health_keeps_what_the_server_tells_and_takes_an_empty_body(connect: Connect) -> None:
    bodies: list[object] = [{"status": "degraded", "engine": "restarting"}, ""]
    with loopback_server(lambda exchange: exchange.answer(200, bodies[len(server.requests) - 1])) as server:
        health = connect(server.url).call("health")
        assert (health.status, health.engine) == ("degraded", "restarting")
        assert connect(server.url).call("health").status == "ok"


def test_readiness_is_a_question_not_an_error(connect: Connect) -> None:
    statuses = [200, 503]
    with loopback_server(lambda exchange: exchange.answer(statuses[len(server.requests) - 1], {})) as server:
        assert connect(server.url).call("is_ready")
        assert not connect(server.url).call("is_ready")
        assert len(server.requests) == 2
    assert not connect(server.url).call("is_ready")


def test_chat_stream_gives_text_then_usage_and_reason(connect: Connect) -> None:
    with loopback_server(lambda exchange: exchange.stream(*answers.chat_chunks("Hel", "", "lo"))) as server:
        streamed = connect(server.url, model="tiny").stream("stream_chat", [{"role": "user", "content": "Hi"}])
    assert streamed.pieces == ["Hel", "lo"]
    assert streamed.usage == Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5)
    assert streamed.finish_reason == "stop"
    body = server.requests[0].body
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})


def test_stream_options_can_be_overridden_but_streaming_cannot(connect: Connect) -> None:
    with loopback_server(lambda exchange: exchange.stream(answers.completion("x", "stop"))) as server:
        driver = connect(server.url, model="tiny")
        driver.stream("stream_complete", "x", stream_options={"include_usage": False}, stream=False)
    assert server.requests[0].body["stream"] is True
    assert server.requests[0].body["stream_options"] == {"include_usage": False}


def test_raw_chunks_hold_every_choice_and_the_text_only_the_first(connect: Connect) -> None:
    events = [
        answers.completion("a", index=0),
        answers.completion("b", index=1),
        answers.completion("", "length", index=1),
        answers.completion("c", "stop", index=0),
    ]
    with loopback_server(lambda exchange: exchange.stream(*events)) as server:
        driver = connect(server.url, model="tiny")
        raw = driver.stream("stream_complete", "x", raw=True)
        text = driver.stream("stream_complete", "x")
    assert [chunk.choices[0].text for chunk in raw.pieces] == ["a", "b", "", "c"]
    assert text.pieces == ["a", "c"]
    assert (raw.finish_reason, text.finish_reason) == ("stop", "stop")


def test_events_may_be_split_between_reads_anywhere(connect: Connect) -> None:
    data = b': hi\r\n\r\ndata: {"choices":[{"text":"\xe4\xbd\xa0","finish_reason":"stop"}]}\r\n\r\ndata: [DONE]\n\n'

    def handle(exchange: Exchange) -> None:
        exchange.start_stream()
        for byte in data:
            exchange.send(bytes([byte]))
        exchange.end_stream()

    with loopback_server(handle) as server:
        assert connect(server.url, model="tiny").stream("stream_complete", "x").pieces == ["你"]


def test_pieces_arrive_before_the_answer_ends(connect: Connect) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.start_stream()
        exchange.send(b'data: {"choices":[{"text":"first"}]}\n\n')
        exchange.wait_for_disconnect()
        server.disconnected.set()

    with loopback_server(handle) as server:
        streamed = connect(server.url, model="tiny").stream("stream_complete", "x", limit=1)
        assert server.disconnected.wait(PATIENCE_S), "leaving the stream must close the connection"
    assert streamed.pieces == ["first"]
    assert streamed.finish_reason is None


def test_cancelling_a_task_closes_its_connection() -> None:
    def handle(exchange: Exchange) -> None:
        exchange.start_stream()
        exchange.send(b'data: {"choices":[{"text":"first"}]}\n\n')
        exchange.wait_for_disconnect()
        server.disconnected.set()

    async def run() -> None:
        begun = asyncio.Event()

        async def read(client: AsyncClient) -> None:
            async with client.stream_complete("x", model="tiny") as stream:
                async for _ in stream:
                    begun.set()

        async with AsyncClient(server.url) as client:
            task = asyncio.create_task(read(client))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.disconnected.wait, 10)

    with loopback_server(handle) as server:
        asyncio.run(run())


def test_error_inside_a_stream_is_raised_after_the_text_before_it(connect: Connect) -> None:
    error = answers.error("engine restarting", type="server_error", code="engine_restarting")
    with loopback_server(lambda exchange: exchange.stream(answers.completion("begun"), error)) as server:
        driver = connect(server.url, model="tiny")
        assert driver.stream("stream_complete", "x", limit=1).pieces == ["begun"]
        with pytest.raises(StreamError) as caught:
            driver.stream("stream_complete", "x")
    assert (caught.value.code, caught.value.type, caught.value.param) == ("engine_restarting", "server_error", None)
    assert len(server.requests) == 2, "a stream that has begun is never retried"


@pytest.mark.parametrize("cleanly", [True, False])
def test_stream_that_is_cut_off_is_an_error(connect: Connect, cleanly: bool) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.start_stream()
        exchange.send(b'data: {"choices":[{"text":"first"}]}\n\n')
        if cleanly:
            exchange.end_stream()
        else:
            exchange.handler.close_connection = True

    with loopback_server(handle) as server, pytest.raises(APIConnectionError):
        connect(server.url, model="tiny").stream("stream_complete", "x")


def test_silence_in_a_stream_is_a_timeout(connect: Connect) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.start_stream()
        exchange.wait_for_disconnect()

    with loopback_server(handle) as server, pytest.raises(APITimeoutError):
        connect(server.url, model="tiny", timeout=httpx.Timeout(10, read=0.2)).stream("stream_complete", "x")


@pytest.mark.parametrize(
    ("method", "body"), [("models", "<html>"), ("models", "[]"), ("models", ""), ("health", "[1]"), ("model", "{}")]
)
def test_answer_that_is_not_openai_style_is_an_error(connect: Connect, method: str, body: str) -> None:
    arguments = ("x",) if method == "model" else ()
    with loopback_server(lambda exchange: exchange.answer(200, body)) as server, pytest.raises(APIResponseError):
        connect(server.url).call(method, *arguments)


@pytest.mark.parametrize("event", [b"data: {\n\n", b"data: []\n\n", b'data: {"choices": 3}\n\n'])
def test_event_that_is_no_chunk_is_an_error(connect: Connect, event: bytes) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.start_stream()
        exchange.send(event)
        exchange.end_stream()

    with loopback_server(handle) as server, pytest.raises(APIResponseError):
        connect(server.url, model="tiny").stream("stream_complete", "x")


def test_stream_request_answered_without_a_stream_is_an_error(connect: Connect) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.answer(200, answers.completion("x", "stop"), {"content-type": "application/json"})

    with loopback_server(handle) as server, pytest.raises(APIResponseError, match="not with a stream"):
        connect(server.url, model="tiny").stream("stream_complete", "x")


def test_unknown_fields_are_kept(connect: Connect) -> None:
    answer: dict[str, Any] = answers.completion("x", "stop") | {"system_fingerprint": "fp_1"}
    with loopback_server(lambda exchange: exchange.answer(200, answer)) as server:
        assert connect(server.url, model="tiny").call("complete", "x").system_fingerprint == "fp_1"
