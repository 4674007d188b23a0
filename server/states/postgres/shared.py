"""The store that replicas share: everything is in PostgreSQL, and this machine has working copies of some files.

What was answered is there: a state is in the database, whole and committed, before its id is told. The engine writes
and reads files here; a file goes to the database when it is kept, and comes from there when it is used and not here.
A beat every few seconds says that this replica lives and what it uses; who was not heard for a while is buried: what it
was making has failed, what it used is free.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import psycopg

from server.engine.state.snapshot_files import write_file
from server.errors import InternalError
from server.states.errors import StoreError, StoreUnavailableError
from server.states.postgres.connections import Postgres
from server.states.postgres.copies import WorkingCopies
from server.states.postgres.database import Beat, InUse, SharedDatabase
from server.states.postgres.rows import use_of
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

SHORT_TTL_S = 30.0
BEAT_S, LEASE_S, PATIENCE_S, RETRY_S = 2.0, 20.0, 10.0, 0.25
_NUM_THREADS = 8
_log = logging.getLogger(__name__)
T = TypeVar("T")


class SharedStore:
    """A `StateStore` in PostgreSQL. Used on one event loop; what waits for the database has threads of its own."""

    def __init__(
        self,
        url: str,
        folder: Path,
        *,
        schema: str = "dijiang",
        max_bytes: int,
        max_copies_bytes: int = 1 << 30,
        eviction: Literal["lru", "refuse"] = "lru",
        beat_s: float = BEAT_S,
        lease_s: float = LEASE_S,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Opens or makes the store.

        Args:
            url: `postgresql://...`.
            folder: for working copies; servers on this machine may share it.
            schema: of the tables; the same for all replicas of a model.
            max_bytes: budget of all snapshots; the same for all replicas.
            max_copies_bytes: of working copies that nobody uses just now.
            eviction: see `EmbeddedStore`.
            beat_s: time between two beats.
            lease_s: after how long without a beat a replica is taken for dead.
            patience_s: how long an answer that is to be kept waits for a database that is away.
            clock: seconds since 1970; None: the database's own.

        Raises:
            StoreError: the database or the folder cannot be used.
        """
        self._max_bytes = max_bytes
        self._eviction = eviction
        self._beat_s = beat_s
        self._patience_s = patience_s
        self._reserved: dict[str, int] = {}
        self._making: set[str] = set()
        self._stored: set[str] = set()
        self._users: Counter[str] = Counter()
        self._bringing: dict[str, asyncio.Task[None]] = {}
        self._beating: asyncio.Task[None] | None = None
        self._is_closed = False
        self._copies = WorkingCopies(folder, max_bytes=max_copies_bytes)
        try:
            postgres = Postgres(url, schema=schema, clock=clock)
            self._database = SharedDatabase(postgres, replica=self._copies.replica, lease_s=lease_s)
            num_states, num_bytes = self._database.open(schema, self._copies.left_behind)
        except (psycopg.Error, StoreUnavailableError, StoreError) as error:
            self._copies.close()
            raise _opening_failed(error) from error
        self._totals = StoreTotals(num_states, num_bytes, max_bytes)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="states")

    @property
    def files_folder(self) -> Path:
        """See `StateStore.files_folder`."""
        return self._copies.folder

    @property
    def totals(self) -> StoreTotals:
        """As of the last beat."""
        return self._totals

    async def start(self, on_response_gone: Callable[[str], None]) -> None:
        """See `StateStore.start`."""
        self._beating = asyncio.create_task(self._beat_on_and_on(on_response_gone))

    @asynccontextmanager
    async def room(self, num_snapshots: int, *, bytes_each: int) -> AsyncIterator[Room]:
        """See `StateStore.room`."""
        files = tuple(new_file() for _ in range(num_snapshots))
        for file in files:
            self._reserved[file] = bytes_each
            self._copies.hold(file)
        try:
            held = self._copies.held
            await self._run(
                lambda: self._database.reserve(
                    files,
                    bytes_each=bytes_each,
                    max_bytes=self._max_bytes,
                    can_evict=self._eviction == "lru",
                    held=held,
                )
            )
            yield Room(self._copies.folder, files)
        finally:
            unused = [file for file in files if self._reserved.pop(file, None) is not None]
            for file in files:
                self._copies.release(file)
            # Shielded: a request that is cancelled gives its room back. If it cannot be told now, the next beat tells.
            with suppress(StoreUnavailableError):
                if unused:
                    await asyncio.shield(self._run(lambda: self._database.release(unused)))

    @asynccontextmanager
    async def hold(
        self, snapshot: SnapshotRecord, *, of: StateRecord | ResponseRecord | None = None
    ) -> AsyncIterator[Path]:
        """See `StateStore.hold`."""
        self._copies.hold(snapshot.file)
        try:
            async with self._in_use_of(of):
                if not self._copies.has(snapshot.file):
                    await self._brought(snapshot)
                yield self._copies.path(snapshot.file)
        finally:
            self._copies.release(snapshot.file)

    @asynccontextmanager
    async def _in_use_of(self, record: StateRecord | ResponseRecord | None) -> AsyncIterator[None]:
        """Keeps what has a time to live from expiring; beats tell that it is used, and the first one may be late."""
        if record is None or record.ttl_s is None:
            yield
            return
        self._users[record.id] += 1
        try:
            if record.ttl_s < SHORT_TTL_S:
                await self._run(lambda: self._database.begin_use(record.id))
            yield
        finally:
            self._users[record.id] -= 1
            is_last = self._users[record.id] == 0
            if is_last:
                del self._users[record.id]
            with suppress(StoreUnavailableError):  # the next beat tells that it is not used any more
                await asyncio.shield(self._run(lambda: self._database.end_use(record.id, is_last=is_last)))

    async def add(self, new: NewState) -> StateRecord:
        """See `StateStore.add`."""
        await self._upload(new.head)
        state_id = new_state_id()
        return await self._keep(lambda: self._database.add(new, state_id=state_id), new.head)

    async def fork(
        self, owner: str, state_id: str, *, point: str | None, name: str | None, ttl_s: float | None
    ) -> StateRecord:
        """See `StateStore.fork`."""
        fork_id = new_state_id()
        return await self._run(
            lambda: self._database.fork(owner, state_id, point=point, fork_id=fork_id, name=name, ttl_s=ttl_s)
        )

    async def get(self, owner: str, state_id: str) -> StateRecord:
        """See `StateStore.get`."""
        return await self._run(lambda: self._database.get(owner, state_id))

    async def use(self, owner: str, state_id: str) -> StateRecord:
        """See `StateStore.use`."""
        return await self._run(lambda: self._database.use(owner, state_id))

    async def list_states(self, owner: str, *, limit: int, after: str | None, name: str | None) -> list[StateRecord]:
        """See `StateStore.list_states`."""
        return await self._run(lambda: self._database.list_states(owner, limit=limit, after=after, name=name))

    async def delete(self, owner: str, state_id: str) -> None:
        """See `StateStore.delete`."""
        await self._run(lambda: self._database.delete(owner, state_id))

    async def advance(self, record: StateRecord, head: SnapshotRecord) -> StateRecord:
        """See `StateStore.advance`."""
        await self._upload(head)
        return await self._keep(lambda: self._database.advance(record, head), head)

    async def mark(self, owner: str, state_id: str, point: str) -> StateRecord:
        """See `StateStore.mark`."""
        return await self._run(lambda: self._database.mark(owner, state_id, point))

    async def rewind(self, owner: str, state_id: str, point: str) -> StateRecord:
        """See `StateStore.rewind`."""
        return await self._run(lambda: self._database.rewind(owner, state_id, point))

    async def put_response(self, response: ResponseRecord) -> None:
        """See `StateStore.put_response`."""
        is_new = response.id not in self._stored
        if response.has_ended or response.is_put_off:
            self._stored.discard(response.id)
        else:
            self._making.add(response.id)
        if response.snapshot is not None:
            await self._upload(response.snapshot)
        await self._keep(lambda: self._database.put_response(response, is_new=is_new), response.snapshot)
        if response.has_ended or response.is_put_off:
            self._making.discard(response.id)
        else:
            self._stored.add(response.id)

    async def take_up_responses(self, limit: int) -> list[ResponseRecord]:
        """See `StateStore.take_up_responses`."""
        return await self._run(lambda: self._database.take_up_responses(limit, on_taken=self._take_up))

    def _take_up(self, response_ids: Collection[str]) -> None:
        """Called on a thread of the database's, before anybody else, a beat say, can see that they are ours."""
        self._making.update(response_ids)
        self._stored.update(response_ids)

    async def get_response(self, owner: str, response_id: str) -> ResponseRecord:
        """See `StateStore.get_response`."""
        return await self._run(lambda: self._database.get_response(owner, response_id))

    async def use_response(self, response_id: str) -> None:
        """See `StateStore.use_response`."""
        await self._run(lambda: self._database.use_response(response_id))

    async def cancel_response(self, owner: str, response_id: str) -> ResponseRecord:
        """See `StateStore.cancel_response`."""
        return await self._run(lambda: self._database.cancel_response(owner, response_id))

    async def delete_response(self, owner: str, response_id: str) -> None:
        """See `StateStore.delete_response`."""
        await self._run(lambda: self._database.delete_response(owner, response_id))

    async def end_response(self, response_id: str) -> None:
        """See `StateStore.end_response`; if it cannot be told now, the next beat tells."""
        if response_id not in self._making or self._is_closed:
            return
        self._making.discard(response_id)
        self._stored.discard(response_id)
        with suppress(StoreUnavailableError):
            await self._run(lambda: self._database.break_off(response_id))

    async def beat(self) -> Beat:
        """Says that this replica lives; see `SharedDatabase.beat`."""
        result = await self._run(lambda: self._database.beat(self._in_use))
        self._copies.drop([*result.gone_copies])
        self._totals = StoreTotals(result.num_states, result.num_bytes, self._max_bytes)
        return result

    async def close(self) -> None:
        """See `StateStore.close`."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)
        with suppress(StoreUnavailableError):
            await self._run(self._database.close)
        self._threads.shutdown()
        self._copies.close()

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except StoreUnavailableError:
            self._totals = replace(self._totals, is_up=False)
            raise
        self._totals = replace(self._totals, is_up=True)
        return result

    async def _keep(self, work: Callable[[], T], kept: SnapshotRecord | None) -> T:
        """Work after which something refers to a snapshot, so that no room is kept for it any more."""
        result = await self._patiently(work)
        if kept is not None:
            self._reserved.pop(kept.file, None)
        return result

    async def _patiently(self, work: Callable[[], T]) -> T:
        """Like `_run`, for work that may be repeated: what was computed is not given up for a moment's outage."""
        patient_until = time.monotonic() + self._patience_s
        while True:
            try:
                return await self._run(work)
            except StoreUnavailableError:
                if time.monotonic() >= patient_until:
                    raise
            await asyncio.sleep(RETRY_S)

    async def _beat_on_and_on(self, on_response_gone: Callable[[str], None]) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            try:
                for response_id in (await self.beat()).gone_responses:
                    on_response_gone(response_id)
            except StoreUnavailableError:
                pass  # said already; the next beat comes
            except Exception:
                _log.exception("a heartbeat of the state store failed")

    def _in_use(self) -> InUse:
        """Called on a thread of the database's; each copy is made in one step."""
        users = (use_of(record_id) for record_id in [*self._users])
        files = {**dict.fromkeys([*self._copies.held, *users], 0), **self._reserved}
        return InUse(files, [*self._making], [*self._stored], self._copies.unused)

    async def _upload(self, snapshot: SnapshotRecord) -> None:
        """Writes what the engine has written to the database, once."""
        if snapshot.file not in self._reserved or self._copies.has(snapshot.file):
            return
        await self._patiently(lambda: self._database.upload(snapshot, self._copies.path(snapshot.file)))
        self._copies.add(snapshot.file, snapshot.num_bytes)

    async def _brought(self, snapshot: SnapshotRecord) -> None:
        """Brings a file here, once for all who wait for it."""
        task = self._bringing.get(snapshot.file)
        if task is None:
            task = self._bringing[snapshot.file] = asyncio.create_task(self._bring(snapshot), name=snapshot.file)
            task.add_done_callback(self._end_bringing)
        await asyncio.shield(task)

    def _end_bringing(self, task: asyncio.Task[None]) -> None:
        del self._bringing[task.get_name()]
        if not task.cancelled():
            task.exception()  # is told to those who wait; perhaps nobody does any more

    async def _bring(self, snapshot: SnapshotRecord) -> None:
        path = self._copies.path(snapshot.file)
        try:
            await self._run(lambda: write_file(path, self._database.content(snapshot)))
        except OSError as error:
            _log.error("a state could not be copied here: %s", error.strerror)
            raise InternalError("the state could not be copied to this server", code="state_not_read") from error
        self._copies.add(snapshot.file, snapshot.num_bytes)


def _opening_failed(error: Exception) -> StoreError:
    """A sentence that names no password."""
    if isinstance(error, StoreError):
        return error
    cause = error.__cause__ if isinstance(error, StoreUnavailableError) and error.__cause__ is not None else error
    return StoreError(f"the store of states cannot be used: {str(cause).strip()}")
