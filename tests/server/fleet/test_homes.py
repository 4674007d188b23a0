"""Which engine a request goes to, and whether it may be sent twice; without Ray."""

import json
from typing import Any

import pytest

from server.fleet.config import FleetConfig
from server.fleet.exchange import Exchange, Head
from server.fleet.homes import Homes, exchange_of, ids_in
from server.fleet.metrics import merged_metrics

STATE, RESPONSE = "state_" + "a" * 32, "resp_" + "b" * 32


def asked(path: str = "/v1/chat/completions", method: str = "POST", key: str = "ann", **body: Any) -> Exchange:
    return exchange_of({"path": path, "method": method}, json.dumps(body).encode() if body else b"", key=key)


def message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_conversation_goes_where_its_state_was_written() -> None:
    homes = Homes()
    homes.running = frozenset({"one", "two"})
    homes.note(ids_in(f'{{"id": "cmpl-1", "state_id": "{STATE}"}}'.encode()), "two")
    homes.note(ids_in(f'{{"id":"{RESPONSE}"}}'.encode()), "one")
    assert homes.of(asked(state_id=STATE, messages=[message("on")]).keys) == "two"
    assert homes.of(asked("/v1/responses", previous_response_id=RESPONSE, input="on").keys) == "one"
    assert homes.of(asked(f"/v1/states/{STATE}", "GET").keys) == "two"
    homes.running = frozenset({"one"})
    assert homes.of(asked(state_id=STATE).keys) is None, "two is gone"


def test_a_chat_that_sends_its_history_again_goes_where_it_was_read() -> None:
    homes = Homes()
    homes.running = frozenset({"one"})
    first = [message("Hello")]
    homes.note(asked(messages=first).keys, "one")
    longer = [*first, {"role": "assistant", "content": "Hi"}, message("Who are you?")]
    assert homes.of(asked(messages=longer).keys) == "one"
    assert homes.of(asked(messages=[message("Bye"), *longer[1:]]).keys) is None
    assert homes.of(asked(messages=longer, key="bob").keys) is None, "another key has another cache"
    assert homes.of(asked(messages=longer, cache_salt="x").keys) is None


def test_a_text_goes_where_its_beginning_was_read() -> None:
    homes = Homes()
    homes.running = frozenset({"one"})
    text = "".join(chr(97 + number % 26) for number in range(5000))
    homes.note(asked("/v1/completions", prompt=text).keys, "one")
    assert homes.of(asked("/v1/completions", prompt=text[:4100] + "!").keys) == "one"
    assert homes.of(asked("/v1/completions", prompt="!" + text).keys) is None


def test_homes_are_bounded() -> None:
    homes = Homes(max_keys=2)
    homes.running = frozenset({"one"})
    homes.note(["a", "b", "c"], "one")
    assert [homes.of([key]) for key in "abc"] == [None, "one", "one"]


@pytest.mark.parametrize(
    ("exchange", "may_repeat"),
    [
        (asked(messages=[message("x")]), True),
        (asked(messages=[], state_id=STATE), True),
        (asked(state_id=STATE, return_state={"update": True}), False),
        (asked(messages=[], return_state={"name": "talk"}), False),
        (asked("/v1/states", prompt="x"), False),
        (asked("/v1/states", "GET"), True),
        (asked(f"/v1/states/{STATE}", "DELETE"), False),
        (asked("/admin/drain", wait_s=1), False),
    ],
)
def test_only_what_changes_nothing_is_sent_again_when_a_replica_was_lost(exchange: Exchange, may_repeat: bool) -> None:
    assert exchange.may_repeat is may_repeat


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"[" * 100_000, b'{"messages": 3, "state_id": 4}', b"\xff"])
def test_bodies_that_make_no_sense_are_for_the_engine_to_refuse(body: bytes) -> None:
    exchange = exchange_of({"path": "/v1/completions", "method": "POST"}, body, key="")
    assert exchange.body == body
    assert exchange.state_id is None


def test_headers_are_found_whatever_their_case() -> None:
    head = Head(200, ((b"X-Dijiang-Replica", b"one"),))
    assert head.header("x-dijiang-replica") == "one"
    assert head.header("retry-after") is None


def test_metrics_of_replicas_are_told_apart_and_types_are_said_once() -> None:
    text = b'# HELP up Up.\n# TYPE up gauge\nup 1.0\n# HELP n N.\n# TYPE n counter\nn_total{kind="a b"} 2.0\n'
    assert merged_metrics({"one": text, "two": text}).decode().splitlines() == [
        "# HELP up Up.",
        "# TYPE up gauge",
        'up{replica="one"} 1.0',
        'up{replica="two"} 1.0',
        "# HELP n N.",
        "# TYPE n counter",
        'n_total{replica="one",kind="a b"} 2.0',
        'n_total{replica="two",kind="a b"} 2.0',
    ]


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        ({"serve": {"model": "m"}}, "need a state_store"),
        ({"fleet": {"min_replicas": 9}, "serve": {"states": False}}, "min_replicas is 9, but max_replicas is 4"),
        ({"serve": {"states": False, "port": 9000}}, "port has no effect"),
        ({"fleet": {"replicas": 2}}, "Extra inputs"),
    ],
)
def test_configurations_that_cannot_take_effect_are_refused(tables: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        FleetConfig(**tables)
