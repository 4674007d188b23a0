"""Requests that mean harm: bounded answers in bounded time, nothing fetched, and the next request is right."""

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from server.keys import hash_key
from server.options import ServiceOptions
from server.text.tokenizer import Tokenizer
from tests.server.api.test_bad_requests import assert_still_right
from tests.server.conftest import OPTIONS, Loopback, raw_exchange, serve
from tests.server.fake_engine import EOS_TOKEN_ID, FakeEngine
from tests.server.tiny_engine import TinyEngine
from tests.tiny_models import tiny_network
from tests.waiting import PATIENCE_S

GIBIBYTE = 1 << 30


def test_a_gibibyte_is_refused_when_it_is_announced(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.middleware.DRAIN_S", 0.05)  # how long it waits for what is under way
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    answer = raw_exchange(server, head + b"content-length: %d\r\n\r\n" % GIBIBYTE, b'{"messages": [')
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"body_too_large" in answer
    assert_still_right(server)


@pytest.mark.parametrize(
    "item", [{"role": 1, "content": {"x" * 500: 1}}, {"type": "function_call", "name": "a b" * 500}, {"role": "user"}]
)
def test_ten_thousand_bad_items_are_one_short_error(server: Loopback, item: dict[str, Any]) -> None:
    answer = server.http.post("/v1/responses", json={"input": [item] * 10_000})
    assert answer.status_code == 400
    assert len(answer.content) < 3000
    assert answer.json()["error"]["param"].startswith("input[0]")
    too_many = server.http.post("/v1/responses", json={"input": [{"role": "user", "content": "x"}] * 10_001})
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "input")
    assert_still_right(server)


@pytest.fixture
def listener() -> Iterator[tuple[str, list[bytes]]]:
    """An address, and what was asked for there."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(PATIENCE_S)

        def listen() -> None:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                asked.append(connection.recv(1024))

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/cat.png", asked
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(PATIENCE_S)


def test_nothing_that_a_request_names_is_fetched(server: Loopback, listener: tuple[str, list[bytes]]) -> None:
    url, asked = listener
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "file", "file": {"file_data": url, "filename": "x"}},
        {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
    ]
    for part in parts:
        body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "See"}, part]}]}
        answer = server.http.post("/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[0].content")
    for item in ({"type": "input_image", "image_url": url}, {"type": "input_file", "file_url": url}):
        body = {"input": [{"role": "user", "content": [item]}]}
        assert server.http.post("/v1/responses", json=body).status_code == 400
    schema = {"name": "x", "schema": {"$ref": url}}
    body = {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": schema}}
    assert server.http.post("/v1/completions", json=body).status_code == 400
    assert asked == []
    assert_still_right(server)


@pytest.fixture(scope="module")
def real(byte_tokenizer: Tokenizer) -> Iterator[Loopback]:
    with serve(TinyEngine(tiny_network(), "tiny"), OPTIONS, byte_tokenizer) as running:  # type: ignore[arg-type]
        yield running


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [EOS_TOKEN_ID], "min_tokens": 3},
        {"allowed_token_ids": [65], "logit_bias": {"65": -100}},
        {"allowed_token_ids": [65], "bad_words": ["A"]},
        {"stop_token_ids": list(range(256)), "min_tokens": 4, "allowed_token_ids": [65, 66]},
        {"logit_bias": {str(number): -100 for number in range(260)}},
        {"temperature": 1e-4, "top_p": 0, "min_p": 1, "typical_p": 0, "top_k": 1},
        {"repetition_penalty": 100, "presence_penalty": 2, "frequency_penalty": 2, "temperature": 2},
        {"min_tokens": 4, "ignore_eos": True, "stop": ["A"], "allowed_token_ids": [65]},
    ],
)
def test_fields_that_leave_nothing_to_choose_from_end_in_bounded_time(real: Loopback, fields: dict[str, Any]) -> None:
    plain = {"prompt": "Once", "max_tokens": 6, "seed": 1}
    before = real.http.post("/v1/completions", json=plain).json()["choices"]
    answer = real.http.post("/v1/completions", json={**plain, **fields})
    assert answer.status_code in {200, 400}, answer.text
    if answer.status_code == 200:
        assert answer.json()["usage"]["completion_tokens"] <= 6
    assert real.http.post("/v1/completions", json=plain).json()["choices"] == before


@pytest.mark.parametrize("token_ids", [[260], [-1], [2**63], [1.5], [True], ["1"], [[1]]])
def test_allowed_tokens_outside_the_vocabulary_are_a_400(server: Loopback, token_ids: list[Any]) -> None:
    answer = server.http.post("/v1/completions", json={"prompt": "x", "allowed_token_ids": token_ids})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("allowed_token_ids")
    assert not server.engine.submitted


def test_names_with_line_breaks_come_back_harmless(server: Loopback) -> None:
    for body in ({"prompt": "x", "model": "a\r\nb: c"}, {"prompt": "x", "request_id": "a\nb"}):
        answer = server.http.post("/v1/completions", json=body)
        assert answer.status_code in {400, 404}
        assert "\n" not in answer.json()["error"]["message"]
    answer = raw_exchange(
        server, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-request-id: a\x0bb\r\n\r\n"
    )
    assert b"a\x0bb" not in answer


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"])
def test_a_negative_zero_is_a_zero(server: Loopback, field: str) -> None:
    for zero in ("-0.0", "0"):
        body = f'{{"prompt": "x", "max_tokens": 1, "seed": 1, "{field}": {zero}}}'
        headers = {"content-type": "application/json"}
        assert server.http.post("/v1/completions", content=body, headers=headers).status_code == 200
    first, second = (request.sampling for request in server.engine.submitted)
    assert first == second


@pytest.mark.parametrize("bias", ["1e308", "-1e308", "1e999", "NaN", "Infinity"])
def test_a_bias_without_bounds_is_a_400(server: Loopback, bias: str) -> None:
    body = f'{{"prompt": "x", "logit_bias": {{"1": {bias}}}}}'
    answer = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert not server.engine.submitted


def test_every_key_is_compared_whichever_is_right(
    byte_tokenizer: Tokenizer, options: ServiceOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"sk-{number}" for number in range(5)]
    compared: list[bytes] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return given == known

    hashes = frozenset(hash_key(key.encode()) for key in keys)
    with serve(FakeEngine(), replace(options, key_hashes=hashes), byte_tokenizer) as server:
        monkeypatch.setattr("server.http.middleware.hmac.compare_digest", compare)
        for key in [*keys, "wrong"]:
            compared.clear()
            server.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert set(compared) == hashes


@pytest.mark.parametrize("last", [b'"finish_reason":"stop"', b"[DONE]"])
def test_a_client_that_leaves_at_the_last_chunk_leaves_nothing(server: Loopback, last: bytes) -> None:
    body = b'{"prompt": "x", "max_tokens": 1000, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
            connection.sendall(head % len(body) + body)
            received = b""
            while last not in received:
                received += connection.recv(4096)
    server.wait_until(lambda: not server.engine.running and server.service.num_active == 0)
    assert len(server.engine.submitted) == 5
    assert_still_right(server)
