"""Replicas on one store: what one keeps the others have, and nobody takes away what another is using."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from server.errors import NotFoundError
from server.http.errors import on_wire
from server.states.errors import StateConflictError, StorageFullError
from server.states.index.schema import CHUNK_BYTES
from server.states.indexed import IndexedStore
from server.states.shared import LEASE_S
from server.states.store import NewState
from tests.server.states.stores import SIZE, Clock, SharedKind, advance, budget, die, make, put_response, snapshot
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.anyio
LARGE = bytes(range(256)) * (10 * CHUNK_BYTES // 1024)  # two chunks and a half
TORN_UPLOAD = """
import asyncio, sys
from pathlib import Path
from server.states.indexed import StoreOptions
from server.states.shared import SharedOptions, open_shared_store
from server.states.store import NewState
from tests.server.states.stores import snapshot

async def main(url, schema, folder, pipe):
    store = open_shared_store(Path(folder), SharedOptions(url, schema=schema), StoreOptions(1 << 30))
    async with store.room(1, bytes_each=1 << 20, owner="ann") as room:
        room.path(0).symlink_to(pipe)
        await store.add(NewState("ann", snapshot(room.files[0], num_bytes=1 << 30)))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def kind(shared_kind: SharedKind) -> SharedKind:
    return shared_kind


@pytest.fixture
async def first(kind: SharedKind) -> AsyncIterator[IndexedStore]:
    store = kind.open()
    yield store
    await store.close()


@pytest.fixture
async def second(kind: SharedKind) -> AsyncIterator[IndexedStore]:
    store = kind.open()
    yield store
    await store.close()


@contextmanager
def killed_afterwards(command: list[str]) -> Iterator[None]:
    """Runs a command, and ends it with `kill -9`."""
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.kill()
        process.wait(PATIENCE_S)


def wait_for(kind: SharedKind, statement: str) -> None:
    """Until a statement has a row."""
    until(lambda: kind.ask(statement), or_fail=lambda: statement)


async def test_a_state_of_one_replica_goes_on_at_another(kind: SharedKind) -> None:
    first, second = kind.open(max_bytes=1 << 24), kind.open(max_bytes=1 << 24)
    state = await make(first, name="talk", content=LARGE)
    await first.mark("ann", state.id, "start")
    found = await second.get("ann", state.id)
    assert (found.head, found.name, [point.name for point in found.points]) == (state.head, "talk", ["start"])
    async with second.hold(found.head) as path:
        assert path.read_bytes() == LARGE
        assert path.parent != first.files_folder
    on = await advance(second, found)
    assert (await first.get("ann", state.id)).head == on.head
    assert (await first.rewind("ann", state.id, "start")).head == state.head
    with pytest.raises(StateConflictError):
        await advance(second, on)
    await first.close()
    await second.close()


async def test_many_who_want_a_file_at_once_bring_it_once(
    first: IndexedStore, second: IndexedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = await make(first)
    asked: list[str] = []
    content = second._files.content
    monkeypatch.setattr(second._files, "content", lambda head: asked.append(head.file) or content(head))

    async def read() -> bytes:
        async with second.hold(state.head) as path:
            return path.read_bytes()

    assert await asyncio.gather(*(read() for _ in range(8))) == [b"x" * SIZE] * 8
    assert asked == [state.head.file]


async def test_a_state_that_is_deleted_while_another_replica_reads_it_is_read_whole(kind: SharedKind) -> None:
    first, second = kind.open(max_bytes=1 << 24), kind.open(max_bytes=1 << 24)
    state = await make(first, content=LARGE)
    pieces = second._files.content(state.head)
    begin = next(pieces)
    await first.delete("ann", state.id)
    assert kind.num_files() == 0
    assert begin + b"".join(pieces) == LARGE
    with pytest.raises(NotFoundError) as caught:
        async with second.hold(state.head):
            pass
    assert on_wire(caught.value).code == "state_not_found"
    await first.close()
    await second.close()


async def test_what_a_replica_holds_is_there_until_it_lets_go(
    kind: SharedKind, first: IndexedStore, second: IndexedStore
) -> None:
    state = await make(first)
    async with second.hold(state.head) as path:
        await second.heartbeat()
        await first.delete("ann", state.id)
        assert path.read_bytes() == b"x" * SIZE
        assert kind.num_files() == 1
    await second.heartbeat()
    assert kind.num_files() == 0
    assert not path.exists()


async def test_what_another_replica_holds_is_not_evicted(kind: SharedKind) -> None:
    first, second = kind.open(max_bytes=budget(1)), kind.open(max_bytes=budget(1))
    state = await make(first)
    async with second.hold(state.head):
        await second.heartbeat()
        with pytest.raises(StorageFullError):
            await make(first)
    await second.heartbeat()
    await make(first)
    with pytest.raises(NotFoundError):
        await second.get("ann", state.id)
    await first.close()
    await second.close()


async def test_room_that_another_replica_is_using_counts(kind: SharedKind) -> None:
    first, second = (kind.open(max_bytes=budget(2), eviction="refuse") for _ in range(2))
    async with first.room(2, bytes_each=SIZE, owner="ann"):
        with pytest.raises(StorageFullError):
            await make(second)
    await make(second)
    await first.close()
    await second.close()


async def test_expired_states_go_at_the_next_heartbeat_of_anybody(kind: SharedKind) -> None:
    clock = Clock()
    first, second = kind.open(clock=clock), kind.open(clock=clock)
    state = await make(first, ttl_s=60)
    async with second.hold(state.head) as path:
        clock.now += 61
        await first.heartbeat()
        with pytest.raises(NotFoundError):
            await second.get("ann", state.id)
        assert path.read_bytes() == b"x" * SIZE
    await second.heartbeat()
    assert kind.num_files() == 0
    await first.close()
    await second.close()


async def test_copies_stay_for_the_next_turn_within_their_budget(kind: SharedKind) -> None:
    first = kind.open()
    second = kind.open(max_copies_bytes=2 * SIZE)
    states = [await make(first, content=bytes([number]) * SIZE) for number in range(3)]
    for state in (*states, states[1]):
        async with second.hold(state.head) as path:
            assert path.read_bytes()[0] == states.index(state)
    here = {path.name for path in second.files_folder.iterdir()}
    assert here == {states[1].head.file, states[2].head.file}
    await first.delete("ann", states[1].id)
    await second.heartbeat()
    assert [path.name for path in second.files_folder.iterdir()] == [states[2].head.file]
    await first.close()
    await second.close()


async def test_a_response_cancelled_or_deleted_elsewhere_is_made_no_more(
    first: IndexedStore, second: IndexedStore, kind: SharedKind
) -> None:
    gone: asyncio.Queue[str] = asyncio.Queue()
    maker = kind.open(heartbeat_s=0.01)
    await maker.start(gone.put_nowait)
    made = [await put_response(maker, f"resp_{number}", "in_progress") for number in range(3)]
    assert (await first.cancel_response("ann", "resp_0")).body["status"] == "cancelled"
    await second.delete_response("ann", "resp_1")
    told: set[str] = set()
    while len(told) < 2:
        told.add(await gone.get())
    assert told == {"resp_0", "resp_1"}
    for response in made:
        await maker.put_response(replace(response, body={**response.body, "status": "completed"}))
    assert (await second.get_response("ann", "resp_0")).body["status"] == "cancelled"
    assert (await second.get_response("ann", "resp_2")).body["status"] == "completed"
    await maker.close()


async def test_heartbeats_take_nothing_for_lost_that_has_just_begun(kind: SharedKind, first: IndexedStore) -> None:
    async def work(number: int) -> None:
        state = await make(first)
        response = await put_response(first, f"resp_{number}", "in_progress")
        async with first.hold(state.head):
            await first.put_response(replace(response, body={**response.body, "status": "completed"}))
        await advance(first, state)

    working = asyncio.gather(*(work(number) for number in range(8)))
    while not working.done():
        await first.heartbeat()
    await working
    await first.heartbeat()  # what the last one has noted may have ended since
    for number in range(8):
        assert (await first.get_response("ann", f"resp_{number}")).body["status"] == "completed"
    assert kind.num_files() == 16
    assert kind.ask("SELECT count(*) FROM {}.uses") == [(0,)]


async def test_a_replica_that_was_killed_is_buried_by_the_next_in_its_folder(kind: SharedKind) -> None:
    dead, other = kind.open(max_bytes=budget(4), eviction="refuse"), kind.open(max_bytes=budget(4), eviction="refuse")
    await put_response(dead, "resp_1", "in_progress")
    await put_response(other, "resp_2", "in_progress")
    room = dead.room(1, bytes_each=SIZE, owner="ann")
    await room.__aenter__()
    with pytest.raises(StorageFullError):
        await make(other)
    die(dead)
    assert (await other.get_response("ann", "resp_1")).body["status"] == "in_progress"
    again = kind.open(max_bytes=budget(4), eviction="refuse")
    assert again.files_folder == dead.files_folder
    assert [*again.files_folder.iterdir()] == []
    assert (await other.get_response("ann", "resp_1")).body["status"] == "failed"
    assert (await other.get_response("ann", "resp_2")).body["status"] == "in_progress"
    await make(other)
    await again.close()
    await other.close()


async def test_a_replica_that_is_silent_for_a_lease_is_buried_by_the_others(kind: SharedKind) -> None:
    clock = Clock()
    dead, other = kind.open(clock=clock), kind.open(clock=clock)
    await put_response(dead, "resp_1", "in_progress")
    for _ in range(3):
        await other.heartbeat()
        clock.now += LEASE_S / 4
    await dead.heartbeat()
    for _ in range(5):
        await other.heartbeat()
        assert (await other.get_response("ann", "resp_1")).body["status"] == "in_progress"
        clock.now += LEASE_S / 4
    await other.heartbeat()
    assert (await other.get_response("ann", "resp_1")).body["status"] == "failed"
    # It was only silent: what it does from now on counts again.
    await make(dead)
    await dead.heartbeat()
    await other.heartbeat()
    assert kind.ask("SELECT count(*) FROM {}.replicas") == [(2,)]
    await dead.close()
    await other.close()


async def test_nobody_is_reaped_by_one_who_has_just_come_back(kind: SharedKind) -> None:
    clock = Clock()
    silent, back = kind.open(clock=clock), kind.open(clock=clock)
    await put_response(silent, "resp_1", "in_progress")
    await back.heartbeat()
    clock.now += 10 * LEASE_S
    await back.heartbeat()
    assert (await back.get_response("ann", "resp_1")).body["status"] == "in_progress"
    await silent.close()
    await back.close()


async def test_a_kill_in_the_middle_of_writing_leaves_nothing(kind: SharedKind, tmp_path: Path) -> None:
    store = kind.open(max_bytes=1 << 30, eviction="refuse")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    arguments = [kind.postgres.url, kind.schema, str(tmp_path), str(pipe)]
    with killed_afterwards([sys.executable, "-c", TORN_UPLOAD, *arguments]), pipe.open("wb") as content:
        # The pipe has opened, so the other end is about to read the state's file.
        content.write(LARGE)
        content.flush()
        wait_for(kind, "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'COPY chunks%%' AND state = 'active'")
        assert kind.ask("SELECT count(*) FROM {}.uses") == [(1,)]
    await kind.open().close()
    assert kind.num_files() == 0
    assert kind.ask("SELECT count(*) FROM {}.uses") == [(0,)]
    await make(store)
    await store.close()


async def test_a_client_who_leaves_in_the_middle_of_writing_leaves_nothing(kind: SharedKind, tmp_path: Path) -> None:
    store = kind.open(max_bytes=1 << 30)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    async with store.room(1, bytes_each=len(LARGE), owner="ann") as room:
        room.path(0).symlink_to(pipe)
        adding = asyncio.create_task(store.add(NewState("ann", snapshot(room.files[0], num_bytes=len(LARGE)))))
        content = await asyncio.to_thread(pipe.open, "wb")
        await asyncio.to_thread(content.write, LARGE)
        adding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await adding
    content.close()
    await store.close()
    assert kind.ask("SELECT count(*) FROM {}.snapshots") == [(0,)]
    assert kind.num_files() == 0


async def test_a_file_that_the_engine_has_not_written_is_not_kept(kind: SharedKind, first: IndexedStore) -> None:
    async with first.room(1, bytes_each=SIZE, owner="ann") as room:
        with pytest.raises(FileNotFoundError):
            await first.add(NewState("ann", snapshot(room.files[0])))
    assert kind.num_files() == 0
    assert kind.ask("SELECT count(*) FROM {}.snapshots") == [(0,)]


async def test_an_unfinished_download_leaves_no_file(
    kind: SharedKind, first: IndexedStore, second: IndexedStore
) -> None:
    state = await make(first)
    kind.ask("DELETE FROM {}.chunks")
    with pytest.raises(NotFoundError):
        async with second.hold(state.head):
            pass
    assert [*second.files_folder.iterdir()] == []
