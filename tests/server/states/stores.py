"""Both kinds of stores behind one face, and what their tests make in them."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

from server.states.embedded import open_embedded_store
from server.states.files.bucket import Bucket
from server.states.files.objects import ObjectFiles
from server.states.index.postgres import Postgres
from server.states.index.upkeep import RECORD_BYTES
from server.states.indexed import HEARTBEAT_S, IndexedStore, StoreOptions
from server.states.shared import SharedOptions, open_shared_store
from server.states.store import NewState, Reservation, ResponseRecord, SnapshotRecord, StateRecord, StateStore, TurnEnd
from tests.server.states.fleet.object_server import ObjectServer
from tests.server.states.postgres_server import PostgresServer

SIZE = 100
Eviction = Literal["lru", "refuse"]


def budget(num_states: int) -> int:
    """Bytes that so many states take, with their rows."""
    return num_states * (SIZE + RECORD_BYTES)


class Clock:
    """Time that passes only when told to."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Kind(Protocol):
    """One kind of store, with its data in a place of its own."""

    def open(
        self,
        *,
        max_bytes: int = 100_000,
        eviction: Eviction = "lru",
        clock: Callable[[], float] | None = None,
        monotonic: Callable[[], float] | None = None,
        max_owner_bytes: int | None = None,
    ) -> IndexedStore:
        """A server's store; what was kept before is in it."""
        ...

    async def settle(self, store: StateStore) -> None:
        """Afterwards `store.totals` are up to date."""
        ...

    def num_files(self) -> int:
        """Snapshots that take space."""
        ...


class EmbeddedKind:
    """The store of one server, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(
        self,
        *,
        max_bytes: int = 100_000,
        eviction: Eviction = "lru",
        clock: Callable[[], float] | None = None,
        monotonic: Callable[[], float] | None = None,
        max_owner_bytes: int | None = None,
    ) -> IndexedStore:
        clock = Clock() if clock is None else clock
        monotonic = clock if monotonic is None else monotonic
        return open_embedded_store(
            self._folder, StoreOptions(max_bytes, eviction, max_owner_bytes), clock=clock, monotonic=monotonic
        )

    async def settle(self, store: StateStore) -> None:
        assert isinstance(store, IndexedStore)
        await store.heartbeat()

    def num_files(self) -> int:
        return len([*(self._folder / "files").iterdir()])


class SharedKind:
    """The store that several servers share; each `open` is one more replica."""

    def __init__(self, postgres: PostgresServer, folder: Path) -> None:
        self.folder = folder
        self.postgres = postgres
        self.schema = f"test_{secrets.token_hex(8)}"

    def open(
        self,
        *,
        max_bytes: int = 100_000,
        eviction: Eviction = "lru",
        clock: Callable[[], float] | None = None,
        monotonic: Callable[[], float] | None = None,
        max_owner_bytes: int | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        patience_s: float = 0.0,
        **more: Any,
    ) -> IndexedStore:
        clock = Clock() if clock is None else clock
        monotonic = clock if monotonic is None else monotonic
        options = StoreOptions(max_bytes, eviction, max_owner_bytes, heartbeat_s=heartbeat_s, patience_s=patience_s)
        shared = SharedOptions(self.postgres.url, **{"schema": self.schema, "timeout_s": 10.0, **more})
        return open_shared_store(self.folder, shared, options, clock=clock, monotonic=monotonic)

    async def settle(self, store: StateStore) -> None:
        assert isinstance(store, IndexedStore)
        await store.heartbeat()

    def num_files(self) -> int:
        contents = dict(self.ask("SELECT file, sum(length(data)) FROM {}.chunks GROUP BY file"))
        assert contents == dict(self.ask("SELECT file, num_bytes FROM {}.snapshots"))
        return len(contents)

    def ask(self, statement: str, *values: object) -> list[Any]:
        """Past the store; `{}` is its schema."""
        return self.postgres.ask(statement.replace("{}", self.schema), *values)

    def drop(self) -> None:
        self.ask("DROP SCHEMA IF EXISTS {} CASCADE")


class ObjectKind(SharedKind):
    """The same with the content of states in an object store."""

    def __init__(self, postgres: PostgresServer, folder: Path, objects: ObjectServer) -> None:
        super().__init__(postgres, folder)
        self._objects = objects
        self._prefix = self.schema

    @property
    def bytes_url(self) -> str:
        return f"s3://{self._objects.bucket}/{self._prefix}"

    def open(self, **options: Any) -> IndexedStore:
        return super().open(**{"bytes_url": self.bytes_url, **options})

    def num_files(self) -> int:
        self._tidy()
        found = self._objects.sizes(f"{self._prefix}/")
        assert found == dict(self.ask("SELECT file, num_bytes FROM {}.snapshots"))
        assert found.keys() == {file for (file,) in self.ask("SELECT file FROM {}.objects")}
        assert self.ask("SELECT count(*) FROM {}.chunks") == [(0,)]
        return len(found)

    def _tidy(self) -> None:
        """What the next heartbeat of any server does."""
        with TemporaryDirectory() as folder:
            database = Postgres(self.postgres.url, schema=self.schema, max_connections=1, timeout_s=10)
            bucket = Bucket(self.bytes_url, timeout_s=10, max_connections=1)
            files = ObjectFiles(Path(folder), max_bytes=0, database=database, replica_name="", bucket=bucket)
            files.tidy()
            files.close()
            database.close()


def die(store: IndexedStore) -> None:
    """As after `kill -9`: nobody is told."""
    store._threads.shutdown()
    store._index._database.close()
    store._is_closed = True
    os.close(store._files._lock)  # type: ignore[attr-defined]


def snapshot(file: str, *, position: int = 5, num_bytes: int = SIZE) -> SnapshotRecord:
    return SnapshotRecord(file, position, (7,), 7, TurnEnd.OPEN, num_bytes, "dj-tiny")


def write(room: Reservation, number: int = 0, content: bytes = b"x" * SIZE) -> SnapshotRecord:
    """What the engine does."""
    room.path(number).write_bytes(content)
    return snapshot(room.files[number], num_bytes=len(content))


async def make(
    store: StateStore,
    owner: str = "ann",
    name: str | None = None,
    ttl_s: float | None = None,
    parent: str | None = None,
    content: bytes = b"x" * SIZE,
) -> StateRecord:
    async with store.room(1, bytes_each=len(content), owner=owner) as room:
        return await store.add(NewState(owner, write(room, content=content), name, parent, ttl_s))


async def advance(store: StateStore, state: StateRecord) -> StateRecord:
    async with store.room(1, bytes_each=SIZE, owner=state.owner) as room:
        return await store.advance(state, write(room))


async def put_response(store: StateStore, response_id: str, status: str, *, owner: str = "ann") -> ResponseRecord:
    """One with a conversation."""
    async with store.room(1, bytes_each=SIZE, owner=owner) as room:
        body = {"id": response_id, "status": status, "background": True}
        response = ResponseRecord(response_id, owner, 5.0, None, body, ({"role": "user"},), write(room))
        await store.put_response(response)
    return response
