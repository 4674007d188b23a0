"""The default store: one folder with an SQLite index and one file per snapshot, for one server.

Crash-safe: a file is written whole before the index names it, and removed only after the index has forgotten it. What a
crash leaves between the two is swept at the next start: files that nothing names, and names whose file is gone.
"""

import asyncio
import fcntl
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, TypeVar

from server.states.errors import StoreError, storage_full
from server.states.sqlite.database import StateDatabase
from server.states.store import (
    NewState,
    ResponseRecord,
    Room,
    SnapshotRecord,
    StateRecord,
    StoreTotals,
    new_file,
    new_state_id,
)

Eviction = Literal["lru", "refuse"]
FILES_FOLDER, INDEX_FILE, LOCK_FILE = "files", "states.db", "lock"
_log = logging.getLogger(__name__)
T = TypeVar("T")


class EmbeddedStore:
    """A `StateStore` in a folder. Used on one event loop; the index has a thread of its own."""

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        eviction: Eviction = "lru",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Opens or makes the store and sweeps what a crash has left.

        Args:
            folder: of this store alone; made if it is not there, for this user only.
            max_bytes: budget of all snapshots.
            eviction: when it is used up: `lru` removes what was not used for longest, `refuse` refuses.
            clock: seconds since 1970.

        Raises:
            StoreError: another server uses it, it cannot be written, or its index is damaged.
        """
        self.files_folder = folder / FILES_FOLDER
        self._max_bytes = max_bytes
        self._eviction = eviction
        self._clock = clock
        self._reserved_bytes = 0
        self._is_closed = False
        self._held: Counter[str] = Counter()
        self._making: set[str] = set()
        self._in_use: Counter[str] = Counter()
        self._may_have_put_off = True
        try:
            self.files_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = _lock(folder)
            self._database = StateDatabase(folder / INDEX_FILE)
            self._database.in_use = lambda: (*self._in_use, *self._making)
            self._sweep()
        except StoreError:
            raise
        except Exception as error:
            raise StoreError(f"the folder of states {folder} cannot be used: {error}") from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="states")
        self._totals = self._count()

    @property
    def totals(self) -> StoreTotals:
        """How much there is, as of the last change."""
        return self._totals

    async def start(self, on_response_gone: Callable[[str], None]) -> None:
        """See `StateStore.start`: nothing goes on, and nobody else is there."""

    @asynccontextmanager
    async def room(self, num_snapshots: int, *, bytes_each: int) -> AsyncIterator[Room]:
        """See `StateStore.room`."""
        num_bytes = num_snapshots * bytes_each
        self._reserved_bytes += num_bytes
        try:
            await self._run(lambda: self._make_room(num_bytes))
        except BaseException:
            self._reserved_bytes -= num_bytes
            raise
        files = tuple(new_file() for _ in range(num_snapshots))
        self._held.update(files)
        try:
            yield Room(self.files_folder, files)
        finally:
            self._reserved_bytes -= num_bytes
            await self._release(files)

    @asynccontextmanager
    async def hold(
        self, snapshot: SnapshotRecord, *, of: StateRecord | ResponseRecord | None = None
    ) -> AsyncIterator[Path]:
        """See `StateStore.hold`."""
        self._held[snapshot.file] += 1
        if of is not None:
            self._in_use[of.id] += 1
        try:
            yield self.files_folder / snapshot.file
        finally:
            try:
                if of is not None:
                    await asyncio.shield(self._end_use(of.id))
            finally:
                await self._release((snapshot.file,))

    async def _end_use(self, record_id: str) -> None:
        await self._run(lambda: self._database.end_use(record_id, now=self._clock()))
        self._in_use[record_id] -= 1
        if self._in_use[record_id] == 0:
            del self._in_use[record_id]

    async def add(self, new: NewState) -> StateRecord:
        """See `StateStore.add`."""
        state_id = new_state_id()
        return await self._changed(lambda: self._database.add(new, state_id=state_id, now=self._clock()))

    async def fork(
        self, owner: str, state_id: str, *, point: str | None, name: str | None, ttl_s: float | None
    ) -> StateRecord:
        """See `StateStore.fork`."""
        fork_id = new_state_id()
        return await self._changed(
            lambda: self._database.fork(
                owner, state_id, point=point, fork_id=fork_id, name=name, ttl_s=ttl_s, now=self._clock()
            )
        )

    async def get(self, owner: str, state_id: str) -> StateRecord:
        """See `StateStore.get`."""
        return await self._run(lambda: self._database.get(owner, state_id, now=self._clock()))

    async def use(self, owner: str, state_id: str) -> StateRecord:
        """See `StateStore.use`."""
        return await self._run(lambda: self._database.use(owner, state_id, now=self._clock()))

    async def list_states(self, owner: str, *, limit: int, after: str | None, name: str | None) -> list[StateRecord]:
        """See `StateStore.list_states`."""
        return await self._run(
            lambda: self._database.list_states(owner, limit=limit, after=after, name=name, now=self._clock())
        )

    async def delete(self, owner: str, state_id: str) -> None:
        """See `StateStore.delete`."""
        await self._changed(lambda: self._database.delete(owner, state_id, now=self._clock()))

    async def advance(self, record: StateRecord, head: SnapshotRecord) -> StateRecord:
        """See `StateStore.advance`."""
        return await self._changed(lambda: self._database.advance(record, head, now=self._clock()))

    async def mark(self, owner: str, state_id: str, point: str) -> StateRecord:
        """See `StateStore.mark`."""
        return await self._changed(lambda: self._database.mark(owner, state_id, point, now=self._clock()))

    async def rewind(self, owner: str, state_id: str, point: str) -> StateRecord:
        """See `StateStore.rewind`."""
        return await self._changed(lambda: self._database.rewind(owner, state_id, point, now=self._clock()))

    async def put_response(self, response: ResponseRecord) -> None:
        """See `StateStore.put_response`."""
        is_new = response.id not in self._making
        if not response.has_ended:
            self._making.add(response.id)
        await self._changed(lambda: self._database.put_response(response, is_new=is_new, now=self._clock()))
        if response.has_ended or response.is_put_off:
            self._making.discard(response.id)
        self._may_have_put_off |= response.is_put_off

    async def take_up_responses(self, limit: int) -> list[ResponseRecord]:
        """See `StateStore.take_up_responses`."""
        if not self._may_have_put_off:
            return []
        taken = await self._run(lambda: self._database.take_up_responses(limit, now=self._clock()))
        self._making.update(response.id for response in taken)
        self._may_have_put_off = len(taken) == limit
        return taken

    async def get_response(self, owner: str, response_id: str) -> ResponseRecord:
        """See `StateStore.get_response`."""
        return await self._run(lambda: self._database.get_response(owner, response_id, now=self._clock()))

    async def use_response(self, response_id: str) -> None:
        """See `StateStore.use_response`."""
        await self._run(lambda: self._database.use_response(response_id, now=self._clock()))

    async def cancel_response(self, owner: str, response_id: str) -> ResponseRecord:
        """See `StateStore.cancel_response`."""
        return await self._changed(lambda: self._database.cancel_response(owner, response_id, now=self._clock()))

    async def delete_response(self, owner: str, response_id: str) -> None:
        """See `StateStore.delete_response`."""
        await self._changed(lambda: self._database.delete_response(owner, response_id, now=self._clock()))

    async def end_response(self, response_id: str) -> None:
        """See `StateStore.end_response`."""
        if response_id in self._making and not self._is_closed:
            self._making.discard(response_id)
            await self._changed(lambda: self._database.break_off(response_id, now=self._clock()))

    async def close(self) -> None:
        """See `StateStore.close`."""
        if self._is_closed:
            return
        self._is_closed = True
        await self._run(self._database.close)
        self._thread.shutdown()
        os.close(self._lock)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _changed(self, work: Callable[[], T]) -> T:
        """Runs work that may leave snapshots unused, and removes those."""

        def both() -> T:
            result = work()
            self._remove_unused()
            self._totals = self._count()
            return result

        return await self._run(both)

    async def _release(self, files: tuple[str, ...]) -> None:
        for file in files:
            self._held[file] -= 1
            if self._held[file] <= 0:
                del self._held[file]

        def clean() -> None:
            self._remove_unused()
            known = self._database.files()
            for file in files:
                if file not in known and file not in self._held:
                    (self.files_folder / file).unlink(missing_ok=True)

        # Shielded: a request that is cancelled must not leave its files behind.
        await asyncio.shield(self._run(clean))

    def _count(self) -> StoreTotals:
        return StoreTotals(self._database.num_states(), self._database.num_bytes(), self._max_bytes)

    def _make_room(self, num_bytes: int) -> None:
        """Evicts until the bytes, reserved already, fit; raises `StorageFullError`."""
        self._database.drop_expired(now=self._clock())
        self._remove_unused()
        can_evict = self._eviction == "lru" and num_bytes <= self._max_bytes
        while (wanted := self._database.num_bytes() + self._reserved_bytes) > self._max_bytes:
            if not (can_evict and self._database.drop_oldest(self._held)):
                raise storage_full(wanted, self._max_bytes)
            self._remove_unused()

    def _remove_unused(self) -> None:
        for file in self._database.drop_unused([*self._held]):
            (self.files_folder / file).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """What a crash has left."""
        self._database.break_off(None, now=self._clock())
        self._database.drop_expired(now=self._clock())
        self._database.drop_unused(())
        known = self._database.files()
        found = {path.name: path for path in self.files_folder.iterdir()}
        orphans = found.keys() - known.keys()
        for name in orphans:
            found[name].unlink()
        lost = [file for file, size in known.items() if file not in found or found[file].stat().st_size != size]
        if lost:
            _log.error("%d states were lost: their files are gone or cut off", len(lost))
        self._database.drop_files(lost)


def _lock(folder: Path) -> int:
    """Held for as long as this process lives."""
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StoreError(
            f"another server uses the states in {folder}; give this one a folder of its own (--states-folder)"
        ) from None
    return descriptor
