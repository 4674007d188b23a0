"""Long texts, wherever they stand in a request, are encoded beside the event loop, which answers everybody else."""

import json
import socket
import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from server.keys import hash_key
from server.options import ServiceOptions
from server.text.threads import MAX_INLINE_CHARACTERS, PLACES
from server.text.tokenizer import Tokenizer
from tests.server.conftest import Loopback, serve
from tests.server.fake_engine import FakeEngine
from tests.waiting import PATIENCE_S

LONG = "7" * 20_000
USER = {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f", "description": LONG}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": f'{{"a": "{LONG}"}}'}}
RESULT = {"role": "tool", "tool_call_id": "a", "content": "x"}
CHAT = "/v1/chat/completions"
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("/v1/completions", {"prompt": LONG}),
    "many prompts": ("/v1/completions", {"prompt": ["7" * 4000] * 5}),
    "bad words": ("/v1/completions", {"prompt": "x", "bad_words": ["7" * 250] * 80}),
    "message": (CHAT, {"messages": [{"role": "user", "content": LONG}]}),
    "system message": (CHAT, {"messages": [{"role": "system", "content": LONG}, USER]}),
    "tools": (CHAT, {"messages": [USER], "tools": [TOOL]}),
    "tools beside a system message": (CHAT, {"messages": [{"role": "system", "content": "y"}, USER], "tools": [TOOL]}),
    "calls": (CHAT, {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT]}),
    "prediction": (CHAT, {"messages": [USER], "prediction": {"type": "content", "content": LONG[:10_000]}}),
    "input": ("/v1/responses", {"input": LONG, "store": False}),
    "instructions": ("/v1/responses", {"input": "x", "instructions": LONG, "store": False}),
    "Anthropic's system": ("/v1/messages", {"system": LONG, "messages": [USER], "max_tokens": 5}),
    "Ollama's system": ("/api/generate", {"system": LONG, "prompt": "x"}),
    "tokenize": ("/tokenize", {"prompt": LONG}),
    "tokenized messages": ("/tokenize", {"messages": [{"role": "user", "content": LONG}]}),
    "template": ("/apply-template", {"messages": [{"role": "user", "content": LONG}]}),
    "counted": ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": LONG}]}),
}


@pytest.mark.parametrize(("path", "body"), REQUESTS.values(), ids=REQUESTS)
def test_a_long_text_is_never_encoded_on_the_event_loop(
    server: Loopback, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    lengths: dict[threading.Thread, int] = {}

    def spy(name: str) -> None:
        original = getattr(Tokenizer, name)

        def counted(self: Tokenizer, text: str, **how: Any) -> list[int]:
            thread = threading.current_thread()
            lengths[thread] = lengths.get(thread, 0) + len(text)
            return original(self, text, **how)  # type: ignore[no-any-return]

        monkeypatch.setattr(Tokenizer, name, counted)

    spy("encode")
    spy("encode_plain")
    answer = server.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert lengths.pop(server.thread, 0) <= MAX_INLINE_CHARACTERS
    assert path == "/apply-template" or max(lengths.values()) >= 10_000


def test_a_key_that_sends_many_long_texts_and_leaves_keeps_no_other_key_waiting(
    options: ServiceOptions, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end, begun = threading.Event(), []
    original = Tokenizer.encode

    def held(self: Tokenizer, text: str, **how: Any) -> list[int]:
        if text == LONG:
            begun.append(text)
            assert may_end.wait(PATIENCE_S)
        return original(self, text, **how)

    monkeypatch.setattr(Tokenizer, "encode", held)
    keyed = replace(options, key_hashes=frozenset(hash_key(key) for key in (b"ann", b"bob")))
    content = json.dumps({"prompt": LONG}).encode()
    head = "POST /tokenize HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ann\r\ncontent-type: application/json\r\n"
    with serve(FakeEngine(), keyed, byte_tokenizer) as server, ExitStack() as stack:
        stack.callback(may_end.set)
        bob = {"authorization": "Bearer bob"}
        for _ in range(2):
            connections = [socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) for _ in range(40)]
            for connection in connections:
                connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
            server.wait_until(lambda: len(begun) == PLACES)
            answer = server.http.post("/tokenize", json={"prompt": LONG + "8"}, headers=bob)
            assert answer.json()["count"] == len(LONG) + 1
            for connection in connections:
                connection.close()
        assert len(begun) == PLACES, "what has begun holds its place, and nothing else begins"
        may_end.set()
        ann = {"authorization": "Bearer ann"}
        assert server.http.post("/tokenize", json={"prompt": LONG}, headers=ann).json()["count"] == len(LONG)
