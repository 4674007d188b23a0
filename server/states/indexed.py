"""A store of states: an index in a database, and the files of snapshots.

What was answered is there: a state is in the index, whole and committed, before its id is told. The engine works on
files in a folder here; a file goes to where it is kept before the index names it. A heartbeat every few seconds says
that this server lives and what it uses, and removes what has expired; servers not heard for a while are reaped.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from server.errors import InternalError
from server.states.errors import DiskFullError, StorageFullError, StoreUnavailableError
from server.states.files.snapshot_files import SnapshotFiles
from server.states.index.index import StateIndex
from server.states.index.upkeep import Budget
from server.states.index.uses import READING, Heartbeat, InUse, Use, use_of
from server.states.store import (
    Change,
    NewState,
    Reservation,
    ResponseRecord,
    SnapshotRecord,
    StateRecord,
    StoreTotals,
    new_file,
    new_state_id,
)
from server.states.telling import Telling

Eviction = Literal["lru", "refuse"]
SHORT_TTL_S, HEARTBEAT_S, PATIENCE_S, RETRY_S = 30.0, 2.0, 10.0, 0.25
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How a store is kept.

    Attributes:
        max_bytes: budget of all that is kept; the same for all servers of a store.
        max_owner_bytes: of each owner; None: that of all.
        eviction: when it is used up: `lru` removes what the same owner has not used for longest, `refuse` refuses.
        heartbeat_s: time between two heartbeats.
        patience_s: how long an answer that is to be kept waits for a database that is away.
    """

    max_bytes: int
    eviction: Eviction = "lru"
    max_owner_bytes: int | None = None
    heartbeat_s: float = HEARTBEAT_S
    patience_s: float = PATIENCE_S

    @property
    def budget(self) -> Budget:
        """As the index keeps it."""
        each = self.max_bytes if self.max_owner_bytes is None else self.max_owner_bytes
        return Budget(self.max_bytes, each, can_evict=self.eviction == "lru")


class IndexedStore:
    """A `StateStore`. Used on one event loop; what waits for the database has threads of its own."""

    def __init__(
        self, index: StateIndex, files: SnapshotFiles, options: StoreOptions, *, is_shared: bool, num_threads: int
    ) -> None:
        """Opens or makes the index.

        Args:
            is_shared: whether there may be other servers, and files are kept elsewhere.
            num_threads: that wait for the database.

        Raises:
            StoreError, StoreUnavailableError: see `StateIndex.open`.
        """
        self._index = index
        self._files = files
        self._options = options
        self._is_shared = is_shared
        self._reserved: dict[str, Use] = {}
        self._making: set[str] = set()
        self._stored: set[str] = set()
        self._users: Counter[str] = Counter()
        self._bringing: dict[str, asyncio.Task[None]] = {}
        self._heartbeat: asyncio.Task[None] | None = None
        self._is_closed = False
        self._is_up = True
        self._tell = Telling(self._run)
        index.open(files.left_behind)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="states")

    @property
    def files_folder(self) -> Path:
        """See `StateStore.files_folder`."""
        return self._files.folder

    @property
    def totals(self) -> StoreTotals:
        """As of the last heartbeat, or change."""
        return StoreTotals(*self._index.totals, self._options.max_bytes, self._is_up)

    async def start(self, on_response_gone: Callable[[str], None]) -> None:
        """See `StateStore.start`."""
        self._heartbeat = asyncio.create_task(self._heartbeat_forever(on_response_gone))

    @asynccontextmanager
    async def room(self, num_snapshots: int, *, bytes_each: int, owner: str) -> AsyncIterator[Reservation]:
        """See `StateStore.room`."""
        files = tuple(new_file() for _ in range(num_snapshots))
        use = Use(bytes_each, owner)
        for file in files:
            self._reserved[file] = use
            self._files.hold(file)
        try:
            held = self._files.held
            self._files.make_way(num_snapshots * bytes_each)
            await self._run(lambda: self._index.reserve(files, use, held=held))
            yield Reservation(self._files.folder, files)
        finally:
            unused = [file for file in files if self._reserved.pop(file, None) is not None]
            await self._let_go(files, unused)

    @asynccontextmanager
    async def hold(
        self, snapshot: SnapshotRecord, *, of: StateRecord | ResponseRecord | None = None
    ) -> AsyncIterator[Path]:
        """See `StateStore.hold`."""
        self._files.hold(snapshot.file)
        try:
            async with self._in_use_of(of):
                if not self._files.has(snapshot.file):
                    await self._brought(snapshot)
                yield self._files.path(snapshot.file)
        finally:
            await self._let_go([snapshot.file])

    async def _let_go(self, files: Collection[str], unused: Collection[str] = ()) -> None:
        """Gives back files that were held, and room that nothing was kept in."""
        for file in files:
            self._files.release(file)
        if unused:
            await self._tell(lambda: self._index.release(unused))
        if not self._is_shared:
            await self._tell(lambda: self._index.sweep(files))

    @asynccontextmanager
    async def _in_use_of(self, record: StateRecord | ResponseRecord | None) -> AsyncIterator[None]:
        """Keeps what has a time to live from expiring; heartbeats tell that it is used, and the first may be late."""
        if record is None or record.ttl_s is None:
            yield
            return
        self._users[record.id] += 1
        try:
            if record.ttl_s < SHORT_TTL_S:
                with suppress(StorageFullError):
                    await self._run(lambda: self._index.begin_use(record.id))
            yield
        finally:
            self._users[record.id] -= 1
            is_last = self._users[record.id] == 0
            if is_last:
                del self._users[record.id]
            await self._tell(lambda: self._index.end_use(record.id, is_last=is_last))

    async def add(self, new: NewState) -> StateRecord:
        """See `StateStore.add`."""
        await self._upload(new.head, owner=new.owner)
        state_id = new_state_id()
        return await self._keep(lambda: self._index.add(new, state_id=state_id), new.head)

    async def fork(
        self, owner: str, state_id: str, *, point: str | None, name: str | None, ttl_s: float | None
    ) -> StateRecord:
        """See `StateStore.fork`."""
        fork_id = new_state_id()
        return await self._run(
            lambda: self._index.fork(owner, state_id, point=point, fork_id=fork_id, name=name, ttl_s=ttl_s)
        )

    async def get(self, owner: str, state_id: str) -> StateRecord:
        """See `StateStore.get`."""
        return await self._run(lambda: self._index.get(owner, state_id))

    async def use(self, owner: str, state_id: str) -> StateRecord:
        """See `StateStore.use`."""
        return await self._free(lambda: self._index.use(owner, state_id))

    async def list_states(self, owner: str, *, limit: int, after: str | None, name: str | None) -> list[StateRecord]:
        """See `StateStore.list_states`."""
        return await self._run(lambda: self._index.list_states(owner, limit=limit, after=after, name=name))

    async def delete(self, owner: str, state_id: str) -> None:
        """See `StateStore.delete`."""
        await self._free(lambda: self._index.delete(owner, state_id))

    async def advance(self, record: StateRecord, head: SnapshotRecord) -> StateRecord:
        """See `StateStore.advance`."""
        await self._upload(head, owner=record.owner)
        return await self._keep(lambda: self._index.advance(record, head), head)

    async def mark(self, owner: str, state_id: str, point: str) -> StateRecord:
        """See `StateStore.mark`."""
        return await self._run(lambda: self._index.mark(owner, state_id, point))

    async def rewind(self, owner: str, state_id: str, point: str) -> StateRecord:
        """See `StateStore.rewind`."""
        return await self._run(lambda: self._index.rewind(owner, state_id, point))

    async def begin_response(self, response: ResponseRecord) -> bool:
        """See `StateStore.begin_response`."""
        is_made_here = response.id in self._making
        self._making.add(response.id)
        is_new = False
        try:
            is_new = await self._run(lambda: self._begin_response(response))
        finally:
            if is_new:
                self._stored.add(response.id)
            elif not is_made_here:
                self._making.discard(response.id)
        return is_new

    def _begin_response(self, response: ResponseRecord) -> bool:
        self._files.make_way(0)
        return self._index.begin_response(response)

    async def put_response(self, response: ResponseRecord) -> None:
        """See `StateStore.put_response`."""
        is_new = response.id not in self._stored
        if response.has_ended or response.is_suspended:
            self._stored.discard(response.id)
        else:
            self._making.add(response.id)
        if response.snapshot is not None:
            await self._upload(response.snapshot, owner=response.owner)
        await self._keep(lambda: self._index.put_response(response, is_new=is_new), response.snapshot)
        if response.has_ended or response.is_suspended:
            self._making.discard(response.id)
        else:
            self._stored.add(response.id)

    async def claim_responses(self, limit: int, *, fingerprint: str) -> list[ResponseRecord]:
        """See `StateStore.claim_responses`."""
        index = self._index
        return await self._run(lambda: index.claim_responses(limit, fingerprint=fingerprint, on_taken=self._claim))

    def _claim(self, response_ids: Collection[str]) -> None:
        """Called on a thread of the database's, before anybody else, a heartbeat say, can see that they are ours."""
        self._making.update(response_ids)
        self._stored.update(response_ids)

    async def get_response(self, owner: str, response_id: str) -> ResponseRecord:
        """See `StateStore.get_response`."""
        return await self._run(lambda: self._index.get_response(owner, response_id))

    async def use_response(self, response_id: str) -> None:
        """See `StateStore.use_response`."""
        await self._free(lambda: self._index.use_response(response_id))

    async def change_response(self, owner: str, response_id: str, change: Change) -> ResponseRecord:
        """See `StateStore.change_response`."""
        return await self._run(lambda: self._index.change_response(owner, response_id, change))

    async def cancel_response(self, owner: str, response_id: str) -> ResponseRecord:
        """See `StateStore.cancel_response`."""
        return await self._free(lambda: self._index.cancel_response(owner, response_id))

    async def delete_response(self, owner: str, response_id: str) -> None:
        """See `StateStore.delete_response`."""
        await self._free(lambda: self._index.delete_response(owner, response_id))

    async def end_response(self, response_id: str) -> None:
        """See `StateStore.end_response`; if it cannot be told now, the next heartbeat tells."""
        if response_id not in self._making or self._is_closed:
            return
        self._making.discard(response_id)
        self._stored.discard(response_id)
        with suppress(StoreUnavailableError):
            await self._free(lambda: self._index.break_off(response_id))

    async def heartbeat(self) -> Heartbeat:
        """Says that this replica lives; see `StateIndex.heartbeat`."""
        result = await self._run(lambda: self._index.heartbeat(self._in_use))
        self._files.drop([*result.gone_copies])
        if self._is_shared:
            await self._run(self._files.tidy)
        return result

    async def close(self) -> None:
        """See `StateStore.close`."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            await asyncio.gather(self._heartbeat, return_exceptions=True)
        await self._tell.ended()
        with suppress(StoreUnavailableError):
            await self._run(self._index.close)
        self._threads.shutdown()
        self._files.close()

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except StoreUnavailableError:
            self._is_up = False
            raise
        self._is_up = True
        return result

    async def _free(self, work: Callable[[], T]) -> T:
        """Like `_run`, for what a full disk does not hinder."""
        try:
            return await self._run(work)
        except DiskFullError:
            with self._files.spare_space():
                return await self._run(work)

    async def _keep(self, work: Callable[[], T], kept: SnapshotRecord | None) -> T:
        """Work after which something refers to a snapshot, so that no room is kept for it any more."""
        result = await self._patiently(work)
        if kept is not None:
            self._reserved.pop(kept.file, None)
        return result

    async def _patiently(self, work: Callable[[], T]) -> T:
        """Like `_run`, for work that may be repeated: what was computed is not given up for a moment's outage."""
        patient_until = time.monotonic() + self._options.patience_s
        while True:
            try:
                return await self._free(work)
            except StoreUnavailableError:
                if time.monotonic() >= patient_until:
                    raise
            await asyncio.sleep(RETRY_S)

    async def _heartbeat_forever(self, on_response_gone: Callable[[str], None]) -> None:
        is_full = False
        while True:
            await asyncio.sleep(self._options.heartbeat_s)
            try:
                for response_id in (await self.heartbeat()).gone_responses:
                    on_response_gone(response_id)
            except StoreUnavailableError:
                pass  # said already; the next heartbeat comes
            except DiskFullError:
                if not is_full:
                    _log.error("the disk of the saved states is full")
                is_full = True
            except Exception:
                _log.exception("a heartbeat of the store of states failed")
            else:
                is_full = False

    def _in_use(self) -> InUse:
        """Called on a thread of the database's; each copy is made in one step."""
        users = [use_of(record_id) for record_id in [*self._users]]
        held = self._files.held if self._is_shared else []
        files = {**dict.fromkeys([*held, *users], READING), **self._reserved}
        return InUse(files, [*self._making], [*self._stored], self._files.unused)

    async def _upload(self, snapshot: SnapshotRecord, *, owner: str) -> None:
        """Brings what the engine has written to where it is kept, once."""
        if snapshot.file not in self._reserved or (self._is_shared and self._files.has(snapshot.file)):
            return
        await self._patiently(lambda: self._files.upload(snapshot, owner=owner))
        self._files.add(snapshot.file, snapshot.num_bytes)

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
        self._files.make_way(snapshot.num_bytes)
        try:
            await self._run(lambda: self._files.download(snapshot))
        except OSError as error:
            _log.error("a state could not be copied here: %s", error.strerror)
            raise InternalError("the state could not be copied to this server", code="state_not_read") from error
        self._files.add(snapshot.file, snapshot.num_bytes)
