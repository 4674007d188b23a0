"""What clients of all kinds send, through a real socket: each is taken as the protocol means it."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from server.text.tokenizer import Tokenizer
from tests.server.conftest import LIMITS, OPTIONS, Loopback, raw_exchange, serve
from tests.server.fake_engine import ANSWER, FakeEngine

BODY = json.dumps({"prompt": "x", "max_tokens": 5}).encode()
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
OFFERS = {
    "http/2 in the clear": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n",
    "websocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    "tls": b"Upgrade: TLS/1.0\r\nConnection: keep-alive, Upgrade\r\n",
}


def head(offer: bytes, *, framing: bytes, method: bytes = b"POST", path: bytes = b"/v1/completions") -> bytes:
    return (
        method
        + b" "
        + path
        + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        + offer
        + framing
        + b"\r\n"
    )


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("in_two", [False, True], ids=["one segment", "two segments"])
def test_an_offer_to_upgrade_changes_nothing(server: Loopback, offer: bytes, is_chunked: bool, in_two: bool) -> None:
    framing = b"Transfer-Encoding: chunked\r\n" if is_chunked else b"Content-Length: %d\r\n" % len(BODY)
    body = CHUNKED if is_chunked else BODY
    last = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    first = head(offer, framing=framing)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        if in_two:
            connection.sendall(first)
            time.sleep(0.02)  # two segments, as far as one can ask for them
            connection.sendall(body)
        else:
            connection.sendall(first + body)
        answer = connection.recv(65536)
        while b'"total_tokens"' not in answer:
            answer += connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200")
        connection.sendall(last)  # on the same connection
        rest = b""
        while received := connection.recv(65536):
            rest += received
        assert rest.startswith(b"HTTP/1.1 200")


def test_an_offer_without_a_body_is_ignored_too(server: Loopback) -> None:
    asked = head(
        OFFERS["http/2 in the clear"].replace(b"Upgrade,", b"Upgrade, close,"),
        framing=b"",
        method=b"GET",
        path=b"/health",
    )
    assert raw_exchange(server, asked).startswith(b"HTTP/1.1 200")


def post(server: Loopback, path: str, **body: Any) -> Any:
    return server.http.post(path, json=body)


@pytest.mark.parametrize(
    "path", ["/chat/completions", "/v1/chat/completions", "/v1/v1/chat/completions", "/v1/chat/completions/"]
)
def test_base_urls_are_taken_with_and_without_version(server: Loopback, path: str) -> None:
    answer = post(server, path, messages=[{"role": "user", "content": "x"}])
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize(
    "path", ["/health", "/v1/models", "/v1/models/", "/v1/models/org/tiny", "/version", "/tokenizer_info"]
)
def test_head_is_get_without_a_body(server: Loopback, path: str) -> None:
    got, asked = server.http.get(path), server.http.head(path)
    assert (got.status_code, asked.status_code, asked.content) == (200, 200, b"")
    assert asked.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip"])
def test_an_encoded_body_is_415_and_named(server: Loopback, encoding: str) -> None:
    headers = {"content-encoding": encoding, "content-type": "application/json"}
    answer = server.http.post("/v1/completions", content=b"\x1f\x8b\x08", headers=headers)
    assert answer.status_code == 415
    assert encoding in answer.json()["error"]["message"]


@pytest.mark.parametrize(("coding", "status"), [(b"chunked", 200), (b"Chunked", 200), (b"gzip, chunked", 501)])
def test_a_body_in_another_transfer_encoding_is_501_and_named(server: Loopback, coding: bytes, status: int) -> None:
    asked = head(b"Connection: close\r\n", framing=b"Transfer-Encoding: " + coding + b"\r\n") + CHUNKED
    answer = raw_exchange(server, asked)
    assert answer.startswith(b"HTTP/1.1 %d" % status)
    assert status == 200 or coding in answer


@pytest.mark.parametrize("temperature", [1e-8, 1e-320, 0.0, 0, 9.9e-5])
def test_a_tiny_temperature_is_greedy(server: Loopback, temperature: float) -> None:
    assert post(server, "/v1/completions", prompt="x", temperature=temperature).status_code == 200
    assert server.engine.submitted[-1].sampling.temperature == 0


def test_no_top_logprobs_need_no_logprobs(server: Loopback) -> None:
    chat = [{"role": "user", "content": "x"}]
    for logprobs in (False, None):
        assert post(server, "/v1/chat/completions", messages=chat, top_logprobs=0, logprobs=logprobs).status_code == 200
    assert post(server, "/v1/chat/completions", messages=chat, top_logprobs=1, logprobs=False).status_code == 400


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 5.0},
        {"n": 2.0, "seed": 1.0},
        {"max_completion_tokens": 5.0, "top_k": 3.0},
        {"stop_token_ids": [1.0, 2]},
    ],
    ids=str,
)
def test_whole_numbers_are_integers(server: Loopback, fields: dict[str, Any]) -> None:
    assert (
        post(server, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], **fields).status_code == 200
    )


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 1.5}, {"n": True}, {"seed": 1e300}, {"stop_token_ids": [1, 2.5]}], ids=str
)
def test_other_numbers_are_none(server: Loopback, fields: dict[str, Any]) -> None:
    assert (
        post(server, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], **fields).status_code == 400
    )


def test_a_wrong_call_in_the_history_is_one_complaint(server: Loopback) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "not a name", "arguments": "{}"}}
    answer = post(server, "/v1/chat/completions", messages=[{"role": "assistant", "tool_calls": [call]}])
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "messages[0].tool_calls[0].function.name")
    assert "content" not in error["message"]


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"properties": {"a": value}}
    return value


@pytest.mark.parametrize("depth", [60, 400])
@pytest.mark.parametrize("field", ["tools", "response_format", "metadata", "chat_template_kwargs"])
def test_deep_nesting_is_400_at_the_door(server: Loopback, depth: int, field: str) -> None:
    function = {"name": "f", "parameters": nested(depth)}
    values: dict[str, Any] = {
        "tools": [{"type": "function", "function": function}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": nested(depth)}},
    }
    answer = post(
        server,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "x"}],
        **{field: values.get(field, nested(depth))},
    )
    assert answer.status_code == 400
    assert "nested more than 100 levels" in answer.json()["error"]["message"]


def test_a_refusal_in_the_history_is_text(server: Loopback) -> None:
    for message in ({"content": [{"type": "refusal", "refusal": "No."}]}, {"content": None, "refusal": "No."}):
        messages = [
            {"role": "user", "content": "x"},
            {"role": "assistant", **message},
            {"role": "user", "content": "y"},
        ]
        written = post(server, "/apply-template", messages=messages).json()["prompt"]
        assert "No." in written


def test_detokenizing_tells_all_tokens_even_half_a_character(server: Loopback) -> None:
    half = "é".encode()[:1]
    assert post(server, "/detokenize", tokens=[*b"ab", *half]).json()["prompt"] == "ab\ufffd"
    assert post(server, "/detokenize", tokens=[*"aé".encode()]).json()["prompt"] == "aé"


@pytest.fixture
def guarded(byte_tokenizer: Tokenizer) -> Iterator[Loopback]:
    options = replace(
        OPTIONS, host_names=("localhost", ".localhost", "127.", "::1"), other_names=("second", "org/third")
    )
    with serve(FakeEngine(), options, byte_tokenizer, limits=LIMITS) as running:
        yield running


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("app.localhost", 200),
        ("127.0.0.1:1", 200),
        ("127.8.9.1", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("127.evil.example", 403),
        ("localhost.evil.example", 403),
        ("xlocalhost", 403),
    ],
)
def test_a_local_server_answers_to_local_names_only(guarded: Loopback, host: str, status: int) -> None:
    assert guarded.http.get("/v1/models", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("version", "hosts", "status"),
    [
        (b"1.1", (), 400),
        (b"1.1", (b"localhost",), 200),
        (b"1.1", (b"localhost", b"localhost"), 400),
        (b"1.1", (b"localhost", b"evil.example"), 400),
        (b"1.0", (), 200),
        (b"1.0", (b"localhost", b"evil.example"), 400),
    ],
)
@pytest.mark.parametrize("name", ["server", "guarded"])
def test_a_request_names_one_host(
    name: str, version: bytes, hosts: tuple[bytes, ...], status: int, request: pytest.FixtureRequest
) -> None:
    lines = b"".join(b"Host: %s\r\n" % host for host in hosts)
    asked = b"GET /v1/models HTTP/%s\r\n%sConnection: close\r\n\r\n" % (version, lines)
    head, _, body = raw_exchange(request.getfixturevalue(name), asked).partition(b"\r\n\r\n")
    assert head.split()[1] == b"%d" % status
    if status == 400:
        assert json.loads(body)["error"]["code"] == "invalid_host"


def test_every_served_name_is_taken_and_echoed(guarded: Loopback) -> None:
    assert [card["id"] for card in guarded.http.get("/v1/models").json()["data"]] == ["org/tiny", "second", "org/third"]
    for name in ("org/tiny", "second", "org/third"):
        assert guarded.http.get(f"/v1/models/{name}").json()["id"] == name
        assert post(guarded, "/v1/completions", prompt="x", model=name).json()["model"] == name
    assert post(guarded, "/v1/completions", prompt="x", model="fourth").status_code == 404


def test_models_tell_a_number_that_clients_understand(server: Loopback) -> None:
    card = server.http.get("/v1/models").json()["data"][0]
    assert (card["max_model_len"], card["context_length"], card["max_prompt_tokens"]) == (1 << 20, 1 << 20, None)


def large(unit: str, count: int) -> bytes:
    return ("[" + ",".join([unit] * count) + "]").encode()


LARGE_BODIES = {
    "tools that are numbers": ("/v1/responses", b'{"input":"a","tools":%s}' % large("1", 300_000)),
    "include": ("/v1/responses", b'{"input":"a","include":%s}' % large('"x"', 500_000)),
    "allowed tokens that are texts": (
        "/v1/completions",
        b'{"prompt":"a","allowed_token_ids":%s}' % large('"1"', 500_000),
    ),
    "allowed tokens, the last one wrong": (
        "/v1/completions",
        b'{"prompt":"a","allowed_token_ids":%s}' % large("1", 500_000).replace(b"]", b',"x"]'),
    ),
    "a million prompts": ("/v1/completions", b'{"prompt":%s}' % large("[1]", 1_000_000)),
    "messages": ("/v1/chat/completions", b'{"messages":%s}' % large('{"role":"user"}', 90_000)),
    "unknown keys": (
        "/v1/completions",
        b'{"prompt":"a","n":99,%s}' % b",".join(b'"k%d":1' % n for n in range(190_000)),
    ),
    "escaped quotes": ("/v1/completions", b'{"prompt":5,"user":"%s"}' % (rb"\"" * 4_000_000)),
}


@pytest.mark.parametrize(("path", "body"), LARGE_BODIES.values(), ids=LARGE_BODIES)
def test_a_large_bad_body_is_refused_with_one_sentence_and_the_server_goes_on(
    server: Loopback, path: str, body: bytes
) -> None:
    answers: list[int] = []
    done = threading.Event()

    def poll() -> None:
        while not done.is_set():
            answers.append(server.http.get("/health").status_code)

    polling = threading.Thread(target=poll)
    polling.start()
    refused = server.http.post(path, content=body, headers={"content-type": "application/json"})
    done.set()
    polling.join()
    assert refused.status_code == 400
    assert len(refused.content) < 3000
    assert set(answers) == {200}


def test_a_large_good_prompt_is_taken(server: Loopback) -> None:
    body = b'{"prompt":%s,"max_tokens":1}' % large("97", 300_000)
    answer = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["usage"]["prompt_tokens"]) == (200, 300_000)


def test_long_lists_of_tokens_are_told_as_short_ones(server: Loopback) -> None:
    text = 'é"\\\n' * 9_000
    told = server.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"]) > 40_000
    assert told["tokens"][:5] == [*text[:4].encode()]
    assert told["token_strs"][:5] == told["token_strs"][5:10]
    back = server.http.post("/detokenize", json={"tokens": told["tokens"], "return_token_texts": True}).json()
    assert back["prompt"] == text
    assert len(back["token_texts"]) == told["count"]
    assert back["token_texts"][2:5] == ['"', "\\", "\n"]
    tricky = [*b'x"token_texts":[]']
    back = server.http.post("/detokenize", json={"tokens": tricky, "return_token_texts": True}).json()
    assert (back["prompt"], "".join(back["token_texts"])) == (bytes(tricky).decode(), bytes(tricky).decode())
    assert server.http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []


def test_where_no_prompt_is_carried_bodies_are_small(server: Loopback) -> None:
    answer = server.http.post(
        "/v1/states/state_1/fork", content=b" " * (300 << 10), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413


def test_a_preflight_from_a_page_of_another_network_is_answered(byte_tokenizer: Tokenizer) -> None:
    origin = "https://app.example"
    with serve(FakeEngine(), replace(OPTIONS, cors_origins=(origin,)), byte_tokenizer) as server:
        headers = {"origin": origin, "access-control-request-method": "POST"}
        headers |= {"access-control-request-headers": "authorization", "access-control-request-private-network": "true"}
        answer = server.http.options("/v1/chat/completions", headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-private-network"] == "true"


def test_a_long_text_is_encoded_as_a_short_one(server: Loopback) -> None:
    long = "ab 1é" * 2000
    tokens = post(server, "/tokenize", prompt=long).json()["tokens"]
    assert bytes(token for token in tokens if token < 256).decode() == long
    assert post(server, "/detokenize", tokens=tokens, skip_special_tokens=True).json()["prompt"] == long
