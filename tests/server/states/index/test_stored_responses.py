"""Responses in a store: being made, ended, suspended, claimed."""

from dataclasses import replace

import pytest

from server.errors import NotFoundError
from server.http.errors import on_wire
from server.states.index.upkeep import MAX_CLAIMS
from server.states.store import REPLAY_KEY, StateStore
from tests.server.states.stores import (
    Clock,
    Kind,
    budget,
    die,
    make,
    put_response,
)

pytestmark = pytest.mark.anyio


async def test_responses_that_are_being_made_or_wait_are_not_evicted(kind: Kind) -> None:
    clock = Clock()
    store = kind.open(max_bytes=budget(6), clock=clock)
    await put_response(store, "made", "in_progress")
    waiting = await put_response(store, "waits", "in_progress")
    await store.put_response(waiting.suspended())
    await put_response(store, "old", "completed")
    for _ in range(6):
        clock.now += 1
        await make(store)
    for response_id in ("made", "waits"):
        assert not (await store.get_response("ann", response_id)).has_ended
    with pytest.raises(NotFoundError):
        await store.get_response("ann", "old")
    await store.close()


async def test_responses_are_kept_with_their_conversation(kind: Kind, store: StateStore) -> None:
    response = await put_response(store, "resp_1", "completed")
    assert await store.get_response("ann", "resp_1") == response
    with pytest.raises(NotFoundError):
        await store.get_response("bob", "resp_1")
    await store.use_response("resp_1")
    await store.delete_response("ann", "resp_1")
    assert kind.num_files() == 0
    with pytest.raises(NotFoundError) as caught:
        await store.get_response("ann", "resp_1")
    assert on_wire(caught.value).code == "response_not_found"


async def test_a_response_becomes_what_its_maker_says_until_it_has_ended(store: StateStore) -> None:
    response = await put_response(store, "resp_1", "in_progress")
    assert (await store.get_response("ann", "resp_1")).body["status"] == "in_progress"
    for status in ("completed", "failed"):
        await store.put_response(replace(response, body={**response.body, "status": status}))
        await store.end_response("resp_1")
        assert (await store.get_response("ann", "resp_1")).body["status"] == "completed"


async def test_a_response_that_nobody_makes_any_more_has_failed(kind: Kind, store: StateStore) -> None:
    await put_response(store, "resp_1", "in_progress")
    await store.end_response("resp_1")
    body = (await store.get_response("ann", "resp_1")).body
    assert (body["status"], body["error"]["code"]) == ("failed", "server_error")
    await store.end_response("resp_1")
    assert kind.num_files() == 1


async def test_a_response_that_was_deleted_while_it_was_made_stays_deleted(kind: Kind, store: StateStore) -> None:
    response = await put_response(store, "resp_1", "in_progress")
    await store.delete_response("ann", "resp_1")
    await store.put_response(replace(response, body={**response.body, "status": "completed"}))
    with pytest.raises(NotFoundError):
        await store.get_response("ann", "resp_1")
    assert kind.num_files() == 0


async def test_a_response_is_cancelled_unless_it_has_ended(store: StateStore) -> None:
    response = await put_response(store, "resp_1", "in_progress")
    assert (await store.cancel_response("ann", "resp_1")).body["status"] == "cancelled"
    await store.put_response(replace(response, body={**response.body, "status": "completed"}))
    assert (await store.get_response("ann", "resp_1")).body["status"] == "cancelled"
    await put_response(store, "resp_2", "completed")
    assert (await store.cancel_response("ann", "resp_2")).body["status"] == "completed"
    with pytest.raises(NotFoundError):
        await store.cancel_response("bob", "resp_2")


async def test_a_response_in_progress_when_its_server_stops_has_failed(kind: Kind) -> None:
    first = kind.open()
    await put_response(first, "resp_1", "in_progress")
    await first.close()
    second = kind.open()
    assert (await second.get_response("ann", "resp_1")).body["status"] == "failed"
    await second.close()


async def test_a_suspended_response_is_claimed_once(kind: Kind) -> None:
    store = kind.open()
    for number in range(3):
        response = await put_response(store, f"r{number}", "in_progress")
        if number == 0:
            assert await store.claim_responses(2, fingerprint="dj") == []
        await store.put_response(response.suspended())
        await store.end_response(f"r{number}")
    assert (await store.get_response("ann", "r0")).body["status"] == "queued"
    await store.close()
    store = kind.open()  # as after a restart
    taken = [*await store.claim_responses(2, fingerprint="dj"), *await store.claim_responses(2, fingerprint="dj")]
    assert sorted(response.id for response in taken) == ["r0", "r1", "r2"]
    assert {response.body["status"] for response in taken} == {"in_progress"}
    assert await store.claim_responses(2, fingerprint="dj") == []
    await kind.settle(store)
    assert (await store.get_response("ann", "r1")).body["status"] == "in_progress"
    await store.put_response(replace(taken[0], body={**taken[0].body, "status": "completed"}))
    assert (await store.get_response("ann", taken[0].id)).body["status"] == "completed"
    assert (await store.cancel_response("ann", taken[1].id)).body["status"] == "cancelled"
    await store.close()


async def test_a_response_whose_server_is_gone_waits_for_another_one_and_not_for_ever(kind: Kind) -> None:
    store = kind.open()
    response = await put_response(store, "resp_1", "in_progress")
    await store.put_response(replace(response, body={**response.body, REPLAY_KEY: {"source": "{}"}}))
    for _ in range(MAX_CLAIMS):
        die(store)
        store = kind.open()
        assert (await store.get_response("ann", "resp_1")).body["status"] == "queued"
        (taken,) = await store.claim_responses(9, fingerprint="dj")
        assert (taken.id, taken.body["status"], taken.body[REPLAY_KEY]) == ("resp_1", "in_progress", {"source": "{}"})
    die(store)
    store = kind.open()
    assert (await store.get_response("ann", "resp_1")).body["status"] == "failed"
    await store.close()


async def test_a_response_waits_for_a_server_of_its_model(kind: Kind, store: StateStore) -> None:
    response = replace(await put_response(store, "resp_1", "in_progress"), fingerprint="dj-one")
    await store.put_response(response)
    await store.put_response(response.suspended())
    assert await store.claim_responses(9, fingerprint="dj-two") == []
    assert (await store.get_response("ann", "resp_1")).body["status"] == "queued"
    (taken,) = await store.claim_responses(9, fingerprint="dj-one")
    assert taken.fingerprint == "dj-one"
