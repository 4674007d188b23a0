"""Bodies that are arriving have a memory in common: who sends slowly keeps nobody else out."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from server.errors import OverloadedError
from server.http import body_budget
from server.http.body_budget import SMALL_BYTES, BodyBudget
from server.keys import EVERYBODY, hash_key
from server.options import ServiceOptions
from server.text.tokenizer import Tokenizer
from tests.server.conftest import Loopback, serve
from tests.server.fake_engine import FakeEngine
from tests.waiting import PATIENCE_S

LARGE = 700 << 10


def test_small_bodies_are_not_counted_and_large_ones_whole() -> None:
    budget = BodyBudget(10 * SMALL_BYTES)
    with budget.claim(EVERYBODY) as count:
        count(SMALL_BYTES)
        assert budget.num_bytes == 0
        count(5)
        assert budget.num_bytes == SMALL_BYTES + 5
    assert budget.num_bytes == 0


def test_no_key_has_more_than_half_and_all_together_no_more_than_there_is() -> None:
    budget = BodyBudget(10 * SMALL_BYTES)
    with ExitStack() as stack:
        counts = [stack.enter_context(budget.claim(owner)) for owner in ("ann", "ann", "bob", "carl")]
        counts[0](4 * SMALL_BYTES)
        with pytest.raises(OverloadedError, match="of this key"):
            counts[1](2 * SMALL_BYTES)
        counts[2](5 * SMALL_BYTES)
        with pytest.raises(OverloadedError, match="that are arriving take 589,824 bytes, limit 655,360"):
            counts[3](2 * SMALL_BYTES)
    assert budget.num_bytes == 0


def test_memory_goes_back_to_the_system_after_many_large_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[bool] = []
    monkeypatch.setattr(body_budget, "_trim", lambda: trimmed.append(True))
    budget = BodyBudget(1 << 30)
    for size, num_trims in ((1 << 20, 0), (100 << 20, 1), (1 << 20, 1)):
        with budget.claim("ann") as first, budget.claim("bob") as second:
            first(size)
            second(size)
        assert len(trimmed) == num_trims


@pytest.fixture
def server(options: ServiceOptions, byte_tokenizer: Tokenizer) -> Iterator[Loopback]:
    hashes = frozenset(hash_key(key) for key in (b"ann", b"bob"))
    limited = replace(options, key_hashes=hashes, max_arriving_bytes=2 << 20)
    with serve(FakeEngine(), limited, byte_tokenizer) as running:
        yield running


def test_who_sends_many_bodies_and_never_their_ends_is_refused_and_others_are_answered(server: Loopback) -> None:
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ann\r\n"
        "content-type: application/json\r\ncontent-length: {}\r\n\r\n"
    )
    with ExitStack() as stack:
        connections = []
        for _ in range(3):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)
            connections.append(stack.enter_context(connection))
            connection.sendall(head.format(LARGE + 1).encode() + b" " * LARGE)
        answered, body = [], {"prompt": "x" * (LARGE // 2), "max_tokens": 1}
        bob = server.http.post("/v1/completions", json=body, headers={"authorization": "Bearer bob"})
        assert bob.status_code == 200
        for connection in connections[::-1]:
            connection.sendall(b" ")  # the end of its body, which is no JSON
            answered.append(connection.recv(1000).split(b" ", 2)[1])
    assert sorted(answered) == [b"400", b"503", b"503"], "one of them fits into half of the memory"
