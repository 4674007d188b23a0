"""What every store of states promises: owned, named, bounded, and there again after a restart."""

import asyncio
from collections.abc import Collection
from dataclasses import replace

import pytest

from server.errors import NotFoundError
from server.http.errors import on_wire
from server.states.errors import StateConflictError, StorageFullError, StoreUnavailableError
from server.states.index.index import StateIndex
from server.states.store import NewState, ResponseRecord, StateStore
from tests.server.states.stores import (
    SIZE,
    Clock,
    Kind,
    advance,
    budget,
    make,
    put_response,
    write,
)

pytestmark = pytest.mark.anyio


async def test_a_state_is_there_again_after_a_restart(kind: Kind) -> None:
    first = kind.open()
    kept = await make(first, name="a talk")
    await first.mark("ann", kept.id, "start")
    await first.close()
    second = kind.open()
    back = await second.get("ann", kept.id)
    assert (back.name, back.head, [point.name for point in back.points]) == ("a talk", kept.head, ["start"])
    await second.close()


async def test_ids_are_long_and_never_the_same(kind: Kind, store: StateStore) -> None:
    ids = {(await make(store)).id for _ in range(20)}
    assert len(ids) == 20
    assert all(len(state_id) == len("state_") + 32 for state_id in ids)


@pytest.mark.parametrize("state_id", ["", "../../etc/passwd", "state_" + "0" * 32, "x' OR 1=1 --", "\0"])
async def test_unknown_ids_are_not_found(kind: Kind, store: StateStore, state_id: str) -> None:
    await make(store)
    for call in (store.get, store.use, store.delete):
        with pytest.raises(NotFoundError) as caught:
            await call("ann", state_id)
        assert on_wire(caught.value).code == "state_not_found"


async def test_another_owner_finds_nothing(kind: Kind, store: StateStore) -> None:
    state = await make(store, "ann", name="mine")
    for call in (store.get, store.use, store.delete):
        with pytest.raises(NotFoundError):
            await call("bob", state.id)
    with pytest.raises(NotFoundError):
        await store.mark("bob", state.id, "p")
    with pytest.raises(NotFoundError):
        await store.list_states("bob", limit=10, after=state.id, name=None)
    assert await store.list_states("bob", limit=10, after=None, name=None) == []
    assert (await make(store, "bob", name="mine")).name == "mine"


async def test_listing_is_newest_first_in_pages(kind: Kind, store: StateStore) -> None:
    ids = [(await make(store, name=f"n{number}")).id for number in range(5)]
    page = await store.list_states("ann", limit=2, after=None, name=None)
    assert [state.id for state in page] == [ids[4], ids[3]]
    page = await store.list_states("ann", limit=10, after=ids[3], name=None)
    assert [state.id for state in page] == [ids[2], ids[1], ids[0]]
    assert [state.id for state in await store.list_states("ann", limit=9, after=None, name="n1")] == [ids[1]]
    assert await store.list_states("ann", limit=9, after=None, name="\0") == []


async def test_a_page_begins_where_the_last_one_ended_though_its_states_are_gone(kind: Kind, store: StateStore) -> None:
    ids = [(await make(store)).id for _ in range(5)]
    page = await store.list_states("ann", limit=2, after=None, name=None)
    for state in page:
        await store.delete("ann", state.id)
    rest = await store.list_states("ann", limit=9, after=page[-1].cursor, name=None)
    assert [state.id for state in rest] == [ids[2], ids[1], ids[0]]
    assert await store.list_states("bob", limit=9, after=page[-1].cursor, name=None) == []
    for nonsense in ("page_", "page_-1", "page_1 OR 1=1", "page_" + "f" * 40):
        with pytest.raises(NotFoundError):
            await store.list_states("ann", limit=9, after=nonsense, name=None)


async def test_a_name_is_used_once(kind: Kind, store: StateStore) -> None:
    await make(store, name="one")
    with pytest.raises(StateConflictError) as caught:
        await make(store, name="one")
    assert on_wire(caught.value).code == "state_name_taken"
    assert kind.num_files() == 1


async def test_a_deleted_state_takes_its_file_along(kind: Kind, store: StateStore) -> None:
    state = await make(store)
    await store.delete("ann", state.id)
    assert kind.num_files() == 0
    with pytest.raises(NotFoundError):
        await store.get("ann", state.id)


async def test_a_fork_shares_the_file_until_both_are_gone(kind: Kind, store: StateStore) -> None:
    state = await make(store)
    fork = await store.fork("ann", state.id, point=None, name="another way", ttl_s=9.0)
    assert (fork.head, fork.parent, fork.name, fork.ttl_s) == (state.head, state.id, "another way", 9.0)
    await store.delete("ann", state.id)
    assert kind.num_files() == 1
    await store.delete("ann", fork.id)
    assert kind.num_files() == 0


async def test_a_state_that_is_just_used_keeps_its_file_while_it_is_deleted(kind: Kind, store: StateStore) -> None:
    state = await make(store)
    async with store.hold(state.head) as path:
        await store.delete("ann", state.id)
        assert path == store.files_folder / state.head.file
        assert path.read_bytes() == b"x" * SIZE
    assert kind.num_files() == 0


async def test_points_keep_their_place_and_a_state_can_go_back(kind: Kind, store: StateStore) -> None:
    state = await make(store)
    await store.mark("ann", state.id, "before the joke")
    advanced = await advance(store, state)
    assert advanced.head != state.head
    assert kind.num_files() == 2
    back = await store.rewind("ann", state.id, "before the joke")
    assert back.head == state.head
    assert kind.num_files() == 1
    with pytest.raises(NotFoundError) as caught:
        await store.rewind("ann", state.id, "no such point")
    assert on_wire(caught.value).code == "point_not_found"


async def test_a_point_of_the_same_name_moves(kind: Kind, store: StateStore) -> None:
    state = await make(store)
    await store.mark("ann", state.id, "here")
    advanced = await advance(store, state)
    marked = await store.mark("ann", state.id, "here")
    assert [point.snapshot for point in marked.points] == [advanced.head]
    assert kind.num_files() == 1


async def test_the_slower_of_two_that_advance_one_state_is_told(kind: Kind, store: StateStore) -> None:
    state = await make(store)
    async with store.room(2, bytes_each=SIZE, owner="ann") as room:
        first, second = (write(room, number) for number in (0, 1))
        await store.advance(state, first)
        with pytest.raises(StateConflictError) as caught:
            await store.advance(state, second)
    assert on_wire(caught.value).code == "state_conflict"
    assert kind.num_files() == 1


async def test_what_is_not_used_for_its_time_to_live_is_gone(kind: Kind) -> None:
    clock = Clock()
    store = kind.open(clock=clock)
    state, other = await make(store, ttl_s=60, name="brief"), await make(store)
    clock.now += 50
    await store.use("ann", state.id)
    clock.now += 50
    assert (await store.get("ann", state.id)).expires == clock.now + 10
    clock.now += 11
    with pytest.raises(NotFoundError):
        await store.get("ann", state.id)
    assert [item.id for item in await store.list_states("ann", limit=9, after=None, name=None)] == [other.id]
    await make(store, name="brief")
    assert kind.num_files() == 2
    await store.close()


async def test_the_least_recently_used_states_make_room(kind: Kind) -> None:
    clock = Clock()
    store = kind.open(max_bytes=budget(3), clock=clock)
    states = []
    for _ in range(3):
        clock.now += 1
        states.append(await make(store))
    clock.now += 1
    await store.use("ann", states[0].id)
    await make(store)
    kept = {state.id for state in await store.list_states("ann", limit=9, after=None, name=None)}
    assert states[1].id not in kept
    assert {states[0].id, states[2].id} <= kept
    await kind.settle(store)
    assert (store.totals.num_states, store.totals.num_bytes, store.totals.max_bytes) == (3, budget(3), budget(3))
    await store.close()


async def test_what_is_held_is_not_evicted(kind: Kind) -> None:
    store = kind.open(max_bytes=budget(1))
    state = await make(store)
    async with store.hold(state.head):
        with pytest.raises(StorageFullError):
            await make(store)
    assert (await store.get("ann", state.id)).id == state.id
    await store.close()


async def test_a_full_store_that_may_not_evict_refuses_with_the_numbers(kind: Kind) -> None:
    store = kind.open(max_bytes=budget(2), eviction="refuse")
    state = await make(store)
    await make(store)
    with pytest.raises(StorageFullError, match=r"1,836 bytes .* limit of 1,224 bytes; .*DELETE /v1/states") as caught:
        await make(store)
    assert (on_wire(caught.value).status, on_wire(caught.value).code) == (507, "state_storage_full")
    await store.delete("ann", state.id)
    await make(store)
    await store.close()


async def test_an_owner_who_saves_too_much_costs_nobody_else_anything(kind: Kind) -> None:
    store = kind.open(max_bytes=budget(6), max_owner_bytes=budget(3))
    theirs = [await make(store, "bob", name=f"n{number}") for number in range(3)]
    mine = [await make(store, "ann") for _ in range(8)]
    kept = {state.id for state in await store.list_states("ann", limit=9, after=None, name=None)}
    assert kept == {state.id for state in mine[-3:]}
    for state in theirs:
        assert (await store.get("bob", state.id)).head == state.head
    await store.close()


async def test_a_store_that_others_have_filled_says_so_and_evicts_nothing_of_theirs(kind: Kind) -> None:
    store = kind.open(max_bytes=budget(2), max_owner_bytes=budget(2))
    for _ in range(2):
        await make(store, "bob")
    with pytest.raises(StorageFullError, match=r"what all keys have saved .*--states-disk"):
        await make(store, "ann")
    assert len(await store.list_states("bob", limit=9, after=None, name=None)) == 2
    await store.close()


async def test_texts_of_responses_points_and_forks_count(kind: Kind) -> None:
    store = kind.open(max_owner_bytes=budget(8), eviction="refuse")
    state = await make(store)
    long = {"id": "r", "status": "in_progress", "background": True, "user": "x" * 3 * budget(1)}
    response = ResponseRecord("r", "ann", 5.0, None, long, (), None)
    await store.put_response(response)
    with pytest.raises(StorageFullError, match="your saved states and responses would take"):
        await store.put_response(replace(response, id="r2", body={**long, "user": "x" * 5 * budget(1)}))
    with pytest.raises(StorageFullError):
        await store.put_response(replace(response, body={**long, "status": "completed", "output": "x" * 5 * budget(1)}))
    await store.put_response(response.failed(code="state_storage_full", message="no room"))
    assert (await store.get_response("ann", "r")).body["status"] == "failed"
    calls = (
        lambda number: store.mark("ann", state.id, f"p{number}"),
        lambda _: store.fork("ann", state.id, point=None, name=None, ttl_s=None),
    )
    for call in calls:
        results = await asyncio.gather(*(call(number) for number in range(9)), return_exceptions=True)
        assert {type(result) for result in results} >= {StorageFullError}
    await store.delete_response("ann", "r")
    await make(store)
    await store.close()


async def test_room_that_is_being_used_counts(kind: Kind) -> None:
    store = kind.open(max_bytes=budget(2), eviction="refuse")
    async with store.room(2, bytes_each=SIZE, owner="ann"):
        with pytest.raises(StorageFullError):
            async with store.room(1, bytes_each=SIZE, owner="ann"):
                pass
    await make(store)
    await store.close()


async def test_a_file_that_was_written_but_not_kept_is_removed(kind: Kind, store: StateStore) -> None:
    async with store.room(2, bytes_each=SIZE, owner="ann") as room:
        first, _ = (write(room, number) for number in (0, 1))
        await store.add(NewState("ann", first))
    assert kind.num_files() == 1


async def test_a_fork_of_a_point_begins_there(kind: Kind, store: StateStore) -> None:
    state = await make(store, name="one")
    await store.mark("ann", state.id, "here")
    await advance(store, state)
    fork = await store.fork("ann", state.id, point="here", name=None, ttl_s=None)
    assert fork.head == state.head
    with pytest.raises(NotFoundError) as caught:
        await store.fork("ann", state.id, point="there", name=None, ttl_s=None)
    assert on_wire(caught.value).code == "point_not_found"
    with pytest.raises(NotFoundError):
        await store.fork("bob", state.id, point=None, name=None, ttl_s=None)
    with pytest.raises(StateConflictError):
        await store.fork("ann", state.id, point=None, name="one", ttl_s=None)
    await store.delete("ann", state.id)
    assert kind.num_files() == 1


@pytest.mark.parametrize("ttl_s", [10.0, 100.0])
async def test_what_is_in_use_does_not_expire_and_its_time_begins_again_afterwards(kind: Kind, ttl_s: float) -> None:
    clock = Clock()
    store = kind.open(clock=clock)
    state, idle = await make(store, name="talk", ttl_s=ttl_s), await make(store, ttl_s=ttl_s)
    answer = replace(await put_response(store, "r", "in_progress"), ttl_s=ttl_s)
    await store.put_response(answer)
    async with store.hold(state.head, of=state), store.hold(state.head, of=state):
        await kind.settle(store)
        clock.now += 3 * ttl_s
        await make(store)  # making room is when what has expired is removed
        await kind.settle(store)
        assert (await store.get("ann", state.id)).id == state.id
        assert len(await store.list_states("ann", limit=9, after=None, name="talk")) == 1
        with pytest.raises(StateConflictError):
            await make(store, name="talk")
        with pytest.raises(NotFoundError):
            await store.get("ann", idle.id)
        assert (await store.get_response("ann", "r")).body["status"] == "in_progress"
        state = await advance(store, state)
    clock.now += 0.9 * ttl_s
    assert (await store.get("ann", state.id)).head == state.head
    clock.now += 0.2 * ttl_s
    with pytest.raises(NotFoundError):
        await store.get("ann", state.id)
    await store.close()


async def test_who_leaves_while_a_state_is_kept_loses_no_file_of_it(kind: Kind, store: StateStore) -> None:
    for delay in range(60):
        keeping = asyncio.create_task(make(store, name=f"n{delay}"))
        await asyncio.sleep(delay * 1e-4)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
    await kind.settle(store)
    states = await store.list_states("ann", limit=100, after=None, name=None)
    for state in states:
        async with store.hold(state.head) as path:
            assert path.stat().st_size == SIZE
    assert kind.num_files() == len(states)


async def test_what_is_kept_after_its_room_was_given_back_is_refused(kind: Kind, store: StateStore) -> None:
    async with store.room(1, bytes_each=SIZE, owner="ann") as room:
        written = write(room)
    with pytest.raises((NotFoundError, FileNotFoundError)):
        await store.add(NewState("ann", written, None, None, None))
    await kind.settle(store)
    assert kind.num_files() == 0


async def test_room_that_could_not_be_given_back_at_once_is_at_the_next_heartbeat(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: StateIndex, files: Collection[str]) -> None:
        raise StoreUnavailableError("away")

    store = kind.open()
    with monkeypatch.context() as broken:
        broken.setattr(StateIndex, "release", away)
        async with store.room(1, bytes_each=SIZE, owner="ann") as room:
            write(room)
    await store.heartbeat()
    assert kind.num_files() == 0
    await make(store)
    await store.close()
    again = kind.open()
    assert len(await again.list_states("ann", limit=9, after=None, name=None)) == 1
    await again.close()
