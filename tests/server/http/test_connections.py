"""Connections that trickle, say nothing, say too much or are not read: each ends, and others are not troubled."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import uvicorn

from server.engine.types.requests import GenerationRequest, TokenEvent
from server.http.connections import ConnectionLimits
from server.options import ServiceOptions
from server.startup.front import http_config
from server.startup.settings import Settings
from server.text.tokenizer import Tokenizer
from tests.server.api.test_bad_requests import assert_still_right
from tests.server.conftest import OPTIONS, Loopback, serve
from tests.server.fake_engine import FakeEngine
from tests.waiting import PATIENCE_S, until

GET = b"GET /health HTTP/1.1\r\nhost: x\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
STREAM = b'{"prompt": "x", "max_tokens": 1000000000, "ignore_eos": true, "stream": true}'
LIMITS = ConnectionLimits(head_timeout_s=1.0, unread_timeout_s=1.0)
"""Short enough to wait for; what is sent at once comes well within them."""


class EndlessEngine(FakeEngine):
    """Never ends an answer."""

    async def _events(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        while True:
            await asyncio.sleep(0)
            yield TokenEvent(request.request_id, tuple(b"abcdefgh" * 50))


@pytest.fixture
def strict(byte_tokenizer: Tokenizer) -> Iterator[Loopback]:
    with serve(FakeEngine(), OPTIONS, byte_tokenizer, limits=LIMITS) as running:
        yield running


def connect(server: Loopback) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


@contextmanager
def connect_narrowly(server: Loopback) -> Iterator[socket.socket]:
    """A connection on which little fits between the two ends."""
    assert server.listener is not None
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE_S)
        connection.connect(("127.0.0.1", server.port))
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes; a reset is an end too."""
    answer = b""
    try:
        while received := connection.recv(65536):
            answer += received
    except ConnectionError:
        pass
    return answer


def read_one(connection: socket.socket) -> bytes:
    """One answer of `/health`."""
    answer = b""
    while not answer.endswith(b"}"):
        answer += connection.recv(65536)
    return answer


def num_cut(server: Loopback, reason: str) -> float:
    value = server.service.metrics.registry.get_sample_value("dijiang_connections_cut_total", {"reason": reason})
    return 0.0 if value is None else value


@pytest.mark.parametrize("head", [b"G", GET, POST + b"content-length: 2\r\nx-a: b\r\n", b"GET /" + b"a" * 5000])
def test_headers_that_do_not_come_to_an_end_are_a_408(strict: Loopback, head: bytes) -> None:
    with connect(strict) as connection:
        connection.sendall(head)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"code": "headers_timeout"' in answer
    assert num_cut(strict, "slow_head") == 1
    assert_still_right(strict)


def test_a_byte_now_and_then_does_not_prolong_it(strict: Loopback) -> None:
    with connect(strict) as connection:
        connection.settimeout(0.01)
        answer = b""
        for number in range(1000):
            try:
                connection.sendall(GET[number : number + 1] or b"x")
                answer = connection.recv(100)
                break
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408")


def test_a_connection_that_says_nothing_is_closed(strict: Loopback) -> None:
    with connect(strict) as connection:
        assert read_all(connection) == b""
    strict.wait_until(lambda: num_cut(strict, "slow_head") == 1)


def test_a_used_connection_has_the_same_time_for_its_next_headers(strict: Loopback) -> None:
    with connect(strict) as connection:
        for beginning in (b"", b"\r\n"):  # empty lines between requests are allowed, and are no request
            connection.sendall(beginning + GET + b"\r\n")
            assert read_one(connection).startswith(b"HTTP/1.1 200")
        connection.sendall(GET)
        assert read_all(connection).startswith(b"HTTP/1.1 408")
    with connect(strict) as connection:
        connection.sendall(GET + b"\r\n")
        read_one(connection)
        connection.sendall(b"\r\n")
        assert read_all(connection) == b""


def test_idle_connections_are_kept_for_as_long_as_the_operator_says(server: Loopback) -> None:
    proxies_keep_them_s = 75  # nginx; others 60
    assert Settings().idle_connection_s > proxies_keep_them_s
    config = http_config(Settings(idle_connection_s=1), server.service)
    running = uvicorn.Server(config)
    config.port = 0
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    until(lambda: running.started)
    with socket.create_connection(running.servers[0].sockets[0].getsockname(), timeout=PATIENCE_S) as connection:
        connection.sendall(GET + b"\r\n")
        read_one(connection)
        (protocol,) = running.server_state.connections
        assert protocol.timeout_keep_alive == 1
        assert connection.recv(1) == b"", "it was closed, and nothing was said"
    running.should_exit = True
    thread.join(PATIENCE_S)


def test_an_answer_may_take_longer_than_headers_may(strict: Loopback) -> None:
    strict.engine.hold_after = 1
    with connect(strict) as connection:
        connection.sendall(POST + b"content-length: %d\r\n\r\n%s" % (len(STREAM), STREAM))
        connection.sendall(GET)  # the beginning of another request behind it
        received = connection.recv(65536)
        strict.wait_until(lambda: len(strict.engine.running) == 1)
        with connect(strict) as other:
            assert read_all(other) == b"", "this one was cut off meanwhile"
        assert received.startswith(b"HTTP/1.1 200")
        assert len(strict.engine.running) == 1
    strict.wait_until(lambda: not strict.engine.running)


def test_headers_without_an_end_are_refused_at_a_size(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.connections.LINGER_S", 0.05)
    before = num_cut(server, "large_head")
    with connect(server) as connection:
        connection.sendall(GET + b"x-endless: ")
        try:
            for _ in range(20_000):
                connection.sendall(b"a" * 65536)
        except ConnectionError:
            pass
        else:
            pytest.fail("a gigabyte of headers was taken")
    assert num_cut(server, "large_head") == before + 1
    assert_still_right(server)


def test_a_refusal_of_headers_can_be_read(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.connections.LINGER_S", 0.05)
    with connect(server) as connection:
        for _ in range(5):
            connection.sendall(GET if _ == 0 else b"x-a: " + b"b" * 20_000 + b"\r\n")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 431")
    assert b"headers_too_large" in answer


def test_what_is_no_http_is_answered_in_the_envelope(server: Loopback) -> None:
    with connect(server) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'{"error": {"message"' in answer


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_no_http_behind_requests_costs_none_of_their_answers(server: Loopback, count: int) -> None:
    body = b'{"prompt": "x", "max_tokens": 3}'
    request = POST + f"content-length: {len(body)}\r\n\r\n".encode() + body
    with connect(server) as connection:
        connection.sendall(request * count + b"no HTTP\r\n\r\n")
        assert read_all(connection).count(b"HTTP/1.1 200 OK") == count


def test_a_body_of_no_length_is_refused_with_a_sentence(server: Loopback) -> None:
    with connect(server) as connection:
        connection.sendall(POST + b'\r\n{"prompt": "x"}')
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"the body" in answer


@pytest.mark.parametrize("in_two", [False, True], ids=["one segment", "two segments"])
def test_a_body_whose_chunks_cannot_be_read_is_answered_too(server: Loopback, in_two: bool) -> None:
    head = POST + b'transfer-encoding: chunked\r\n\r\n5\r\n{"pro\r\n'
    with connect(server) as connection:
        if in_two:
            connection.sendall(head)
            time.sleep(0.02)  # two segments, as far as one can ask for them
            connection.sendall(b"zz\r\n")
        else:
            connection.sendall(head + b"zz\r\n")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1
    assert b"invalid_http" in answer
    assert_still_right(server)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("more", [b"", b"connection: keep-alive\r\n"])
def test_http_1_0_gets_no_chunks(server: Loopback, stream: bool, more: bytes) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 5, "stream": stream}).encode()
    head = POST.replace(b"HTTP/1.1", b"HTTP/1.0") + more + b"content-length: %d\r\n\r\n" % len(body)
    with connect(server) as connection:
        connection.sendall(head + body)
        told, _, answer = read_all(connection).partition(b"\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 200")
    assert b"transfer-encoding" not in told
    assert (b"content-length" in told) != stream
    if stream:
        assert answer.startswith(b"data: {")
        assert answer.endswith(b"data: [DONE]\n\n")
        assert all(line.startswith(b"data: ") for line in answer.splitlines() if line)
    else:
        assert json.loads(answer)["usage"]["completion_tokens"] == 5


def test_a_stream_that_is_not_read_ends_and_takes_bounded_memory(
    byte_tokenizer: Tokenizer, options: ServiceOptions
) -> None:
    engine = EndlessEngine()
    with serve(engine, options, byte_tokenizer, limits=LIMITS) as server:
        with connect_narrowly(server) as connection:
            connection.sendall(POST + b"content-length: %d\r\n\r\n%s" % (len(STREAM), STREAM))
            server.wait_until(lambda: len(engine.running) == 1)
            server.wait_until(lambda: not engine.running)
            answer = read_all(connection)
        assert num_cut(server, "unread") == 1
        assert len(answer) < 1 << 20, "it was not written on and on"
        assert not answer.endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
        assert server.http.get("/health").status_code == 200


def test_a_whole_answer_that_is_not_read_does_not_stay_for_ever(
    byte_tokenizer: Tokenizer, options: ServiceOptions
) -> None:
    long = FakeEngine(script=lambda _: b"a" * 400_000, tokens_per_event=100_000)
    with serve(long, options, byte_tokenizer, limits=LIMITS) as server, connect_narrowly(server) as connection:
        body = b'{"prompt": "x", "max_tokens": 400000}'
        connection.sendall(POST + b"connection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        server.wait_until(lambda: num_cut(server, "unread") == 1)


def test_a_reader_that_is_slow_but_reads_is_not_cut_off(strict: Loopback) -> None:
    strict.engine.script = lambda _: b"abcd" * 50_000
    strict.engine.tokens_per_event = 10_000
    body = STREAM.replace(b"1000000000", b"200000")
    with connect(strict) as connection:
        connection.sendall(POST + b"connection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        answer = read_all(connection)
    assert b"data: [DONE]" in answer[-100:]
    assert answer.count(b"abcd") >= 49_900  # but for those that are cut by an event's end
    assert num_cut(strict, "unread") == 0


def test_one_connection_too_many_is_told_so_counted_and_logged(
    byte_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(FakeEngine(), OPTIONS, byte_tokenizer, limits=replace(LIMITS, max_connections=2)) as server:
        held = [connect(server) for _ in range(2)]
        for connection in held:
            connection.sendall(GET)
        with connect(server) as refused:
            answer = read_all(refused)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"too_many_connections"' in answer
        assert "connections are refused: 2 are open" in caplog.text
        for connection in held:
            connection.close()
        server.wait_until(lambda: server.http.get("/health").status_code == 200)
        assert 'dijiang_connections_cut_total{reason="too_many"} ' in server.http.get("/metrics").text
