"""A PostgreSQL that is away, comes back, or is not what it should be."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from server.http.errors import on_wire
from server.states.errors import StoreError, StoreUnavailableError
from server.states.indexed import StoreOptions
from server.states.shared import SharedOptions, open_shared_store
from server.states.store import NewState
from tests.server.states.stores import SIZE, SharedKind, make, put_response, write
from tests.waiting import until_async

pytestmark = pytest.mark.anyio
Call = Callable[[], Coroutine[Any, Any, object]]


@pytest.fixture
def kind(shared_kind: SharedKind) -> SharedKind:
    return shared_kind


async def test_connections_that_broke_while_nobody_used_them_are_made_anew(kind: SharedKind) -> None:
    store = kind.open()
    state = await make(store)
    kind.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'dijiang'")
    assert (await store.get("ann", state.id)).id == state.id
    await store.close()


async def test_while_the_server_is_away_every_call_says_so_and_then_all_is_as_it_was(kind: SharedKind) -> None:
    store = kind.open()
    state = await make(store, name="talk")
    response = await put_response(store, "resp_1", "in_progress")
    ended = replace(response, body={**response.body, "status": "completed"})
    calls: list[Call] = [
        lambda: store.get("ann", state.id),
        lambda: store.use("ann", state.id),
        lambda: store.list_states("ann", limit=9, after=None, name=None),
        lambda: store.mark("ann", state.id, "here"),
        lambda: store.delete("ann", state.id),
        lambda: store.put_response(ended),
        lambda: make(store),
        lambda: store.heartbeat(),
    ]
    room = store.room(1, bytes_each=SIZE, owner="ann")
    await room.__aenter__()
    kind.postgres.stop()
    try:
        for call in calls:
            with pytest.raises(StoreUnavailableError) as caught:
                await call()
            assert (on_wire(caught.value).status, on_wire(caught.value).code) == (503, "state_store_unavailable")
        assert not store.totals.is_up
        await room.__aexit__(None, None, None)  # what is given back meanwhile is no error
        await store.end_response("resp_1")
    finally:
        kind.postgres.start()
    assert (await store.get("ann", state.id)).head == state.head
    assert store.totals.is_up
    assert len(kind.ask("SELECT file FROM {}.uses")) == 1
    await store.heartbeat()
    assert kind.ask("SELECT file FROM {}.uses") == []
    assert (await store.get_response("ann", "resp_1")).body["status"] == "failed"
    assert kind.num_files() == 2
    await store.close()


async def test_an_answer_that_is_to_be_kept_waits_for_a_server_that_is_away_for_a_moment(kind: SharedKind) -> None:
    store = kind.open(patience_s=60.0)
    state = await make(store)
    response = await put_response(store, "resp_1", "in_progress")
    async with store.room(2, bytes_each=SIZE, owner="ann") as room:
        kind.postgres.stop()
        keeping = asyncio.gather(
            store.add(NewState("ann", write(room, 0), "talk")),
            store.advance(state, write(room, 1)),
            store.put_response(replace(response, body={**response.body, "status": "completed"})),
        )
        await until_async(lambda: not store.totals.is_up)
        await asyncio.to_thread(kind.postgres.start)
        added, advanced, _ = await keeping
    assert (await store.get("ann", added.id)).name == "talk"
    assert (await store.get("ann", state.id)).head == advanced.head
    assert (await store.get_response("ann", "resp_1")).body["status"] == "completed"
    assert kind.num_files() == 3
    await store.close()


async def test_what_was_kept_without_an_answer_may_be_kept_again(kind: SharedKind) -> None:
    store = kind.open()
    async with store.room(2, bytes_each=SIZE, owner="ann") as room:
        first, second = (write(room, number) for number in (0, 1))
        for _ in range(2):
            store._files.upload(first, owner="ann")
            state = store._index.add(NewState("ann", first, "talk"), state_id="state_1")
        store._files.upload(second, owner="ann")
        assert {store._index.advance(state, second).head for _ in range(2)} == {second}
    assert kind.num_files() == 1
    await store.close()


async def test_a_store_closes_without_its_server(kind: SharedKind) -> None:
    store = kind.open()
    await store.start(lambda _: None)
    kind.postgres.stop()
    try:
        await store.close()
        await store.close()
    finally:
        kind.postgres.start()


def test_a_server_that_is_not_there_is_a_sentence_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the store of states cannot be used: connection failed") as caught:
        open_shared_store(tmp_path, SharedOptions("postgresql://ann:secret@127.0.0.1:1/db"), StoreOptions(100))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["postgresql://127.0.0.1:none/db", "postgresql://127.0.0.1/?no_such_option=1"])
def test_an_address_that_is_none_is_a_sentence(url: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the store of states cannot be used"):
        open_shared_store(tmp_path, SharedOptions(url), StoreOptions(100))


async def test_a_server_that_hangs_is_away_within_its_time_and_comes_back(
    kind: SharedKind, caplog: pytest.LogCaptureFixture
) -> None:
    store = kind.open(timeout_s=1.0)
    state = await make(store)
    with kind.postgres.hanging():
        results = await asyncio.gather(*(store.get("ann", state.id) for _ in range(40)), return_exceptions=True)
        assert {type(result) for result in results} == {StoreUnavailableError}
        assert not store.totals.is_up
        with pytest.raises(StoreUnavailableError):
            await store.heartbeat()
    assert [record.levelname for record in caplog.records if "does not answer" in record.message] == ["ERROR"]
    while not store.totals.is_up:
        with contextlib.suppress(StoreUnavailableError):
            await store.heartbeat()
    assert (await store.get("ann", state.id)).head == state.head
    await store.close()


async def test_many_at_once_wait_for_the_few_connections_that_the_server_has(kind: SharedKind) -> None:
    stores = [kind.open(max_bytes=1 << 20, timeout_s=60.0) for _ in range(2)]
    taken = [psycopg.connect(kind.postgres.url, autocommit=True) for _ in range(kind.postgres.num_connections - 5)]
    try:
        states = await asyncio.gather(*(make(stores[number % 2]) for number in range(128)))
    finally:
        for connection in taken:
            connection.close()
    assert len({state.id for state in states}) == 128
    for store in stores:
        await store.close()


async def test_whoever_may_not_make_tables_is_told(kind: SharedKind) -> None:
    kind.ask("CREATE ROLE visitor LOGIN")
    shared = SharedOptions(kind.postgres.url.replace("dijiang@", "visitor@"), schema=kind.schema)
    try:
        with pytest.raises(StoreError, match=r"the tables of states cannot be made .* permission denied"):
            open_shared_store(kind.folder, shared, StoreOptions(100))
    finally:
        kind.ask("DROP ROLE visitor")


def test_a_folder_that_cannot_be_written_is_a_sentence(kind: SharedKind, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    shared = SharedOptions(kind.postgres.url, schema=kind.schema)
    with pytest.raises(StoreError, match=r"the folder of copies of states .* cannot be used"):
        open_shared_store(tmp_path / "file", shared, StoreOptions(100))


async def test_two_replicas_may_begin_at_once(kind: SharedKind) -> None:
    stores = await asyncio.gather(*(asyncio.to_thread(kind.open) for _ in range(4)))
    assert len({store.files_folder for store in stores}) == 4
    for store in stores:
        await make(store)
        await store.close()
