"""The embedded store: owned, named, bounded, and whole after any end."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.errors import NotFoundError
from server.states.embedded import EmbeddedStore, Eviction
from server.states.errors import StateConflictError, StorageFullError, StoreError
from server.states.store import NewState, ResponseRecord, SnapshotRecord, StateRecord, Turn

pytestmark = pytest.mark.anyio
SIZE = 100


class Clock:
    """Time that passes only when told to."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def open_store(
    folder: Path, *, max_bytes: int = 10_000, eviction: Eviction = "lru", clock: Clock | None = None
) -> EmbeddedStore:
    return EmbeddedStore(folder, max_bytes=max_bytes, eviction=eviction, clock=Clock() if clock is None else clock)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    store = open_store(tmp_path)
    yield store
    await store.close()


def snapshot(file: str, *, position: int = 5) -> SnapshotRecord:
    return SnapshotRecord(file, position, (7,), 7, Turn.OPEN, SIZE, "dj-tiny")


def write(store: EmbeddedStore, file: str) -> SnapshotRecord:
    (store.files_folder / file).write_bytes(b"x" * SIZE)
    return snapshot(file)


async def make(
    store: EmbeddedStore,
    owner: str = "ann",
    name: str | None = None,
    ttl_s: float | None = None,
    parent: str | None = None,
) -> StateRecord:
    async with store.room(1, bytes_each=SIZE) as room:
        return await store.add(NewState(owner, write(store, room.files[0]), name, parent, ttl_s))


def num_files(store: EmbeddedStore) -> int:
    return len([*store.files_folder.iterdir()])


async def test_a_state_is_there_again_after_a_restart(tmp_path: Path) -> None:
    first = open_store(tmp_path)
    kept = await make(first, name="a talk")
    await first.mark("ann", kept.id, "start")
    await first.close()
    second = open_store(tmp_path)
    back = await second.get("ann", kept.id)
    assert (back.name, back.head, [point.name for point in back.points]) == ("a talk", kept.head, ["start"])
    await second.close()


async def test_ids_are_long_and_never_the_same(store: EmbeddedStore) -> None:
    ids = {(await make(store)).id for _ in range(20)}
    assert len(ids) == 20
    assert all(len(state_id) == len("state_") + 32 for state_id in ids)


@pytest.mark.parametrize("state_id", ["", "../../etc/passwd", "state_" + "0" * 32, "x' OR 1=1 --", "\0"])
async def test_unknown_ids_are_not_found(store: EmbeddedStore, state_id: str) -> None:
    await make(store)
    for call in (store.get, store.use, store.delete):
        with pytest.raises(NotFoundError) as caught:
            await call("ann", state_id)
        assert caught.value.code == "state_not_found"


async def test_another_owner_finds_nothing(store: EmbeddedStore) -> None:
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


async def test_listing_is_newest_first_in_pages(store: EmbeddedStore) -> None:
    ids = [(await make(store, name=f"n{number}")).id for number in range(5)]
    page = await store.list_states("ann", limit=2, after=None, name=None)
    assert [state.id for state in page] == [ids[4], ids[3]]
    page = await store.list_states("ann", limit=10, after=ids[3], name=None)
    assert [state.id for state in page] == [ids[2], ids[1], ids[0]]
    assert [state.id for state in await store.list_states("ann", limit=9, after=None, name="n1")] == [ids[1]]


async def test_a_name_is_used_once(store: EmbeddedStore) -> None:
    await make(store, name="one")
    with pytest.raises(StateConflictError) as caught:
        await make(store, name="one")
    assert caught.value.code == "state_name_taken"
    assert num_files(store) == 1


async def test_a_deleted_state_takes_its_file_along(store: EmbeddedStore) -> None:
    state = await make(store)
    await store.delete("ann", state.id)
    assert num_files(store) == 0
    with pytest.raises(NotFoundError):
        await store.get("ann", state.id)


async def test_a_fork_shares_the_file_until_both_are_gone(store: EmbeddedStore) -> None:
    state = await make(store)
    fork = await store.add(NewState("ann", state.head, parent=state.id))
    await store.delete("ann", state.id)
    assert num_files(store) == 1
    await store.delete("ann", fork.id)
    assert num_files(store) == 0


async def test_a_state_that_is_just_used_keeps_its_file_while_it_is_deleted(store: EmbeddedStore) -> None:
    state = await make(store)
    async with store.hold(state.head) as file:
        await store.delete("ann", state.id)
        assert (store.files_folder / file).exists()
    assert num_files(store) == 0


async def test_points_keep_their_place_and_a_state_can_go_back(store: EmbeddedStore) -> None:
    state = await make(store)
    await store.mark("ann", state.id, "before the joke")
    async with store.room(1, bytes_each=SIZE) as room:
        advanced = await store.advance(state, write(store, room.files[0]))
    assert advanced.head != state.head
    assert num_files(store) == 2
    back = await store.rewind("ann", state.id, "before the joke")
    assert back.head == state.head
    assert num_files(store) == 1
    with pytest.raises(NotFoundError) as caught:
        await store.rewind("ann", state.id, "no such point")
    assert caught.value.code == "point_not_found"


async def test_a_point_of_the_same_name_moves(store: EmbeddedStore) -> None:
    state = await make(store)
    await store.mark("ann", state.id, "here")
    async with store.room(1, bytes_each=SIZE) as room:
        advanced = await store.advance(state, write(store, room.files[0]))
    marked = await store.mark("ann", state.id, "here")
    assert [point.snapshot for point in marked.points] == [advanced.head]
    assert num_files(store) == 1


async def test_the_slower_of_two_that_advance_one_state_is_told(store: EmbeddedStore) -> None:
    state = await make(store)
    async with store.room(2, bytes_each=SIZE) as room:
        first, second = (write(store, file) for file in room.files)
        await store.advance(state, first)
        with pytest.raises(StateConflictError) as caught:
            await store.advance(state, second)
    assert caught.value.code == "state_conflict"
    assert num_files(store) == 1


async def test_what_is_not_used_for_its_time_to_live_is_gone(tmp_path: Path) -> None:
    clock = Clock()
    store = open_store(tmp_path, clock=clock)
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
    assert num_files(store) == 2
    await store.close()


async def test_the_least_recently_used_states_make_room(tmp_path: Path) -> None:
    clock = Clock()
    store = open_store(tmp_path, max_bytes=3 * SIZE, clock=clock)
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
    assert (store.totals.num_states, store.totals.num_bytes, store.totals.max_bytes) == (3, 3 * SIZE, 3 * SIZE)
    await store.close()


async def test_what_is_held_is_not_evicted(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_bytes=SIZE)
    state = await make(store)
    async with store.hold(state.head):
        with pytest.raises(StorageFullError):
            await make(store)
    assert (await store.get("ann", state.id)).id == state.id
    await store.close()


async def test_a_full_store_that_may_not_evict_refuses_with_the_numbers(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_bytes=2 * SIZE, eviction="refuse")
    state = await make(store)
    await make(store)
    with pytest.raises(StorageFullError, match=r"300 bytes .* limit of 200 bytes") as caught:
        await make(store)
    assert (caught.value.status, caught.value.code) == (507, "state_storage_full")
    await store.delete("ann", state.id)
    await make(store)
    await store.close()


async def test_room_that_is_being_used_counts(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_bytes=2 * SIZE, eviction="refuse")
    async with store.room(2, bytes_each=SIZE):
        with pytest.raises(StorageFullError):
            async with store.room(1, bytes_each=SIZE):
                pass
    await make(store)
    await store.close()


async def test_a_file_that_was_written_but_not_kept_is_removed(store: EmbeddedStore) -> None:
    async with store.room(2, bytes_each=SIZE) as room:
        for file in room.files:
            write(store, file)
        await store.add(NewState("ann", snapshot(room.files[0])))
    assert num_files(store) == 1


async def test_what_a_crash_leaves_behind_is_swept(tmp_path: Path) -> None:
    first = open_store(tmp_path)
    whole, lost, cut = await make(first), await make(first), await make(first)
    await first.close()
    (first.files_folder / "orphan.safetensors").write_bytes(b"never named")
    (first.files_folder / ".half.safetensors.partial").write_bytes(b"never renamed")
    (first.files_folder / lost.head.file).unlink()
    (first.files_folder / cut.head.file).write_bytes(b"short")
    second = open_store(tmp_path)
    assert [state.id for state in await second.list_states("ann", limit=9, after=None, name=None)] == [whole.id]
    await second.close()
    third = open_store(tmp_path)
    assert num_files(third) == 1
    await third.close()


async def test_a_second_server_in_the_same_folder_is_refused(store: EmbeddedStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="another server uses the states"):
        open_store(tmp_path)


async def test_a_damaged_index_is_a_sentence_and_nothing_is_removed(tmp_path: Path) -> None:
    first = open_store(tmp_path)
    state = await make(first)
    await first.close()
    for path in [*tmp_path.glob("states.db*")]:  # noqa: ASYNC240
        path.write_bytes(b"no database at all" * 100)
    with pytest.raises(StoreError, match="cannot be used"):
        open_store(tmp_path)
    assert (first.files_folder / state.head.file).exists()


async def test_responses_are_kept_with_their_conversation(store: EmbeddedStore) -> None:
    async with store.room(1, bytes_each=SIZE) as room:
        head = write(store, room.files[0])
        response = ResponseRecord(
            "resp_1", "ann", 5.0, None, {"id": "resp_1", "status": "completed"}, ({"role": "user"},), head
        )
        await store.put_response(response)
    assert await store.get_response("ann", "resp_1") == response
    with pytest.raises(NotFoundError):
        await store.get_response("bob", "resp_1")
    await store.use_response("resp_1")
    await store.delete_response("ann", "resp_1")
    assert num_files(store) == 0
    with pytest.raises(NotFoundError) as caught:
        await store.get_response("ann", "resp_1")
    assert caught.value.code == "response_not_found"
