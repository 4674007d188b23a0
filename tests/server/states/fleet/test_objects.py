"""States whose content is in an object store: moves, outages, and what a crash leaves behind."""

import secrets
from contextlib import ExitStack
from pathlib import Path

import pytest

from server.states.errors import NotFoundError, StoreError, StoreUnavailableError
from server.states.indexed import IndexedStore
from tests.server.states.fleet.object_server import ObjectServer, object_server
from tests.server.states.postgres_server import PostgresServer
from tests.server.states.running import running
from tests.server.states.stores import SIZE, ObjectKind, SharedKind, make
from tests.waiting import until

pytestmark = pytest.mark.anyio


async def content(store: IndexedStore, owner: str, state_id: str) -> bytes:
    state = await store.get(owner, state_id)
    async with store.hold(state.head) as path:
        return path.read_bytes()


async def test_content_is_in_the_object_store_and_goes_with_its_state(
    object_kind: ObjectKind, objects: ObjectServer
) -> None:
    store, other = object_kind.open(replica_name="one"), object_kind.open(replica_name="two")
    state = await make(store, content=b"y" * SIZE)
    assert (await other.get("ann", state.id)).head.held_by == "one"
    assert await content(other, "ann", state.id) == b"y" * SIZE
    assert object_kind.num_files() == 1
    await store.delete("ann", state.id)
    await other.heartbeat()
    assert objects.sizes(f"{object_kind.schema}/") == {}
    await store.close()
    await other.close()


async def test_what_postgresql_holds_stays_readable_after_the_move(object_kind: ObjectKind) -> None:
    before = SharedKind.open(object_kind)
    old = await make(before, content=b"o" * SIZE)
    await before.close()
    store = object_kind.open()
    new = await make(store, content=b"n" * SIZE)
    assert await content(store, "ann", old.id) == b"o" * SIZE
    assert await content(store, "ann", new.id) == b"n" * SIZE
    await store.delete("ann", old.id)
    assert object_kind.num_files() == 1
    await store.close()


async def test_what_a_crash_leaves_is_removed_by_the_next_server_that_looks(
    object_kind: ObjectKind, objects: ObjectServer
) -> None:
    store = object_kind.open()
    await make(store)
    for file in ("written", "noted"):
        object_kind.ask("INSERT INTO {}.objects VALUES (%s)", file)
    objects.client.put_object(Bucket=objects.bucket, Key=f"{object_kind.schema}/written", Body=b"x")
    assert object_kind.num_files() == 1
    await store.close()


async def test_while_the_object_store_is_away_saving_says_so_and_the_index_answers(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with object_server() as objects:
        for name, value in objects.environment.items():
            monkeypatch.setenv(name, value)
        kind = ObjectKind(postgres, tmp_path, objects)
        store, other = kind.open(timeout_s=2.0), kind.open(timeout_s=2.0)
        state = await make(store)
        objects.stop()
        with pytest.raises(StoreUnavailableError):
            await make(store)
        assert (await other.get("ann", state.id)).id == state.id
        with pytest.raises(StoreUnavailableError):
            async with other.hold(state.head):
                pass
        objects.start()  # empty, as after a loss
        with pytest.raises(NotFoundError):
            async with other.hold(state.head):
                pass
        await make(store)
        await store.close()
        await other.close()
        kind.drop()


def test_a_bucket_that_is_not_there_is_a_sentence(object_kind: ObjectKind) -> None:
    with pytest.raises(StoreError, match="the bucket nowhere for the bytes of states cannot be used"):
        object_kind.open(bytes_url="s3://nowhere/x")


@pytest.mark.slow
def test_two_servers_continue_each_others_conversations_from_the_object_store(
    tiny: Path, postgres: PostgresServer, objects: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in objects.environment.items():
        monkeypatch.setenv(name, value)
    schema = f"test_{secrets.token_hex(8)}"
    options = ("--state-store", postgres.url, "--state-store-schema", schema)
    options += ("--state-store-bytes", f"s3://{objects.bucket}/{schema}")
    with ExitStack() as stack:
        one, two = (
            stack.enter_context(running(tiny, tmp_path / name, *options, "--replica-name", name))
            for name in ("one", "two")
        )
        state = one.complete("My name is Ann.", return_state={"name": "talk"})["state_id"]
        assert one.get(f"/v1/states/{state}")["held_by"] == "one"
        expected = one.complete(" Who?", state_id=state)["token_ids"]
        assert two.complete(" Who?", state_id=state, return_state={"update": True})["token_ids"] == expected
        assert one.get(f"/v1/states/{state}")["held_by"] == "two"
        until(lambda: [*objects.sizes(f"{schema}/").values()] == [two.get(f"/v1/states/{state}")["bytes"]])
        assert postgres.ask(f"SELECT count(*) FROM {schema}.chunks") == [(0,)]
