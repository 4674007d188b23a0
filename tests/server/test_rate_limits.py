"""What one key may ask for in a minute."""

import hashlib
from dataclasses import replace

import openai
import pytest

from server.errors import RateLimitError
from server.http.errors import on_wire
from server.options import ServiceOptions
from server.rate_limits import MAX_KEYS, RateLimits
from server.text.tokenizer import Tokenizer
from tests.server.conftest import serve
from tests.server.fake_engine import FakeEngine


class Clock:
    """Stands still unless told otherwise."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_requests_come_back_evenly() -> None:
    clock = Clock()
    limits = RateLimits(6, 0, clock=clock)
    for _ in range(6):
        limits.admit("a")
    with pytest.raises(RateLimitError, match=r"6 requests a minute; try again in 10 s") as caught:
        limits.admit("a")
    assert (on_wire(caught.value).status, on_wire(caught.value).headers) == (429, {"Retry-After": "10"})
    limits.admit("b")
    clock.now = 10.0
    limits.admit("a")
    with pytest.raises(RateLimitError):
        limits.admit("a")


def test_an_hour_of_rest_saves_no_more_than_a_minutes_worth() -> None:
    clock = Clock()
    limits = RateLimits(2, 0, clock=clock)
    limits.admit("a")
    clock.now = 3600.0
    limits.admit("a")
    limits.admit("a")
    with pytest.raises(RateLimitError):
        limits.admit("a")


def test_tokens_are_paid_afterwards() -> None:
    clock = Clock()
    limits = RateLimits(0, 60, clock=clock)
    limits.admit("a")
    limits.charge("a", 90)  # nobody knew how long the answer would be
    with pytest.raises(RateLimitError, match="60 tokens") as caught:
        limits.admit("a")
    assert on_wire(caught.value).headers["Retry-After"] == "31"
    clock.now = 31.0
    limits.admit("a")


def test_a_refused_request_costs_nothing() -> None:
    clock = Clock()
    limits = RateLimits(1, 60, clock=clock)
    limits.charge("a", 60)
    for _ in range(5):
        with pytest.raises(RateLimitError, match="tokens"):
            limits.admit("a")
    clock.now = 1.0
    limits.admit("a")


def test_keys_that_are_never_seen_again_are_forgotten() -> None:
    clock = Clock()
    limits = RateLimits(1, 1, clock=clock)
    for number in range(MAX_KEYS):
        limits.admit(str(number))
    clock.now = 120.0
    for number in range(3):
        limits.admit(f"new {number}")
    assert len(limits._buckets) < 10


def test_over_http_each_key_has_its_own_minute(byte_tokenizer: Tokenizer, options: ServiceOptions) -> None:
    hashes = frozenset(hashlib.sha256(key.encode()).digest() for key in ("ann", "bob"))
    limited = replace(options, key_hashes=hashes, rate_limit_requests=2)
    with serve(FakeEngine(), limited, byte_tokenizer) as server:
        ann, bob = (server.openai.with_options(api_key=key) for key in ("ann", "bob"))
        for _ in range(2):
            ann.completions.create(model="org/tiny", prompt="x", max_tokens=1)
        with pytest.raises(openai.BadRequestError):  # what can never work costs nothing
            ann.completions.create(model="org/tiny", prompt="", max_tokens=1)
        with pytest.raises(openai.RateLimitError) as caught:
            ann.completions.create(model="org/tiny", prompt="x", max_tokens=1)
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "rate_limit_error")
        assert 0 < int(caught.value.response.headers["retry-after"]) <= 60
        with pytest.raises(openai.RateLimitError):
            ann.chat.completions.create(model="org/tiny", messages=[{"role": "user", "content": "x"}])
        assert ann.models.list().data
        assert bob.completions.create(model="org/tiny", prompt="x", max_tokens=1).choices


def test_over_http_tokens_are_counted_when_an_answer_ends(byte_tokenizer: Tokenizer, options: ServiceOptions) -> None:
    with serve(FakeEngine(), replace(options, rate_limit_tokens=30), byte_tokenizer) as server:
        server.openai.completions.create(model="org/tiny", prompt="x" * 10, max_tokens=10)
        chunks = server.openai.completions.create(model="org/tiny", prompt="x" * 10, max_tokens=10, stream=True)
        assert len(list(chunks)) > 5
        with pytest.raises(openai.RateLimitError, match="30 tokens"):
            server.openai.completions.create(model="org/tiny", prompt="x", max_tokens=1)
