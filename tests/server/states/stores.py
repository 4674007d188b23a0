"""Both kinds of stores behind one face, and what their tests make in them."""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from server.states.postgres.shared import SharedStore
from server.states.sqlite.embedded import EmbeddedStore
from server.states.store import NewState, ResponseRecord, Room, SnapshotRecord, StateRecord, StateStore, Turn
from tests.server.states.postgres_server import PostgresServer

SIZE = 100
Eviction = Literal["lru", "refuse"]


class Clock:
    """Time that passes only when told to."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Kind(Protocol):
    """One kind of store, with its data in a place of its own."""

    def open(
        self, *, max_bytes: int = 10_000, eviction: Eviction = "lru", clock: Callable[[], float] | None = None
    ) -> StateStore:
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
        self, *, max_bytes: int = 10_000, eviction: Eviction = "lru", clock: Callable[[], float] | None = None
    ) -> EmbeddedStore:
        clock = Clock() if clock is None else clock
        return EmbeddedStore(self._folder, max_bytes=max_bytes, eviction=eviction, clock=clock)

    async def settle(self, store: StateStore) -> None:
        pass

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
        max_bytes: int = 10_000,
        eviction: Eviction = "lru",
        clock: Callable[[], float] | None = None,
        **more: Any,
    ) -> SharedStore:
        clock = Clock() if clock is None else clock
        more = {
            "clock": clock,
            "schema": self.schema,
            "max_bytes": max_bytes,
            "eviction": eviction,
            "patience_s": 0.0,
            **more,
        }
        return SharedStore(self.postgres.url, self.folder, **more)

    async def settle(self, store: StateStore) -> None:
        assert isinstance(store, SharedStore)
        await store.beat()

    def num_files(self) -> int:
        contents = dict(self.ask("SELECT file, sum(length(data)) FROM {}.chunks GROUP BY file"))
        assert contents == dict(self.ask("SELECT file, num_bytes FROM {}.snapshots"))
        return len(contents)

    def ask(self, statement: str, *values: object) -> list[Any]:
        """Past the store; `{}` is its schema."""
        return self.postgres.ask(statement.replace("{}", self.schema), *values)

    def drop(self) -> None:
        self.ask("DROP SCHEMA IF EXISTS {} CASCADE")


def snapshot(file: str, *, position: int = 5, num_bytes: int = SIZE) -> SnapshotRecord:
    return SnapshotRecord(file, position, (7,), 7, Turn.OPEN, num_bytes, "dj-tiny")


def write(room: Room, number: int = 0, content: bytes = b"x" * SIZE) -> SnapshotRecord:
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
    async with store.room(1, bytes_each=len(content)) as room:
        return await store.add(NewState(owner, write(room, content=content), name, parent, ttl_s))


async def advance(store: StateStore, state: StateRecord) -> StateRecord:
    async with store.room(1, bytes_each=SIZE) as room:
        return await store.advance(state, write(room))


async def put_response(store: StateStore, response_id: str, status: str, *, owner: str = "ann") -> ResponseRecord:
    """One with a conversation."""
    async with store.room(1, bytes_each=SIZE) as room:
        body = {"id": response_id, "status": status, "background": True}
        response = ResponseRecord(response_id, owner, 5.0, None, body, ({"role": "user"},), write(room))
        await store.put_response(response)
    return response
