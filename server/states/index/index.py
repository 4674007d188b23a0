"""What a store of states knows: states, responses, which snapshots there are, and who uses what.

Servers change things one after the other, in transactions of milliseconds. A snapshot is gone when nothing refers to it
and no server uses it; what a server uses is forgotten with the server. Times are the database's.

The files of snapshots are beside the index, in a folder of this server alone (`home`), or they are in the same
database, written before anything refers to them. A file in a home is known to the index for as long as it exists: as a
snapshot, or as in use while it is written, and from the commit that drops it until it is removed.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from server.states.errors import StoreUnavailableError, name_taken, owner_full, state_conflict, storage_full
from server.states.index.database import AMONG, Database, Transaction
from server.states.index.rows import (
    delete_responses,
    delete_states,
    delete_unreferenced,
    files_among,
    find_response,
    find_responses,
    find_state,
    insert_snapshot,
    insert_state,
    list_states,
    require_snapshot,
    unreferenced,
    write_response,
)
from server.states.index.schema import SCHEMA_VERSION, ensure_tables
from server.states.index.upkeep import (
    RECORD_BYTES,
    Budget,
    break_off,
    drop_expired,
    drop_oldest,
    drop_unused,
    other_replicas,
    reap,
    silent_replicas,
    totals,
    wanted_bytes,
)
from server.states.index.uses import Heartbeat, InUse, Use, end_uses, note_use, note_uses, register, use_of
from server.states.store import NewState, ResponseRecord, SnapshotRecord, StateRecord

NOBODY = ""
"""The maker of a response that was put off: whoever takes it up."""


class SnapshotHome(Protocol):
    """The folder of the files of snapshots, if they are beside the index."""

    @property
    def held(self) -> list[str]:
        """Files that are not removed just now."""
        ...

    def remove(self, files: Collection[str]) -> None:
        """Removes what is there of these files."""
        ...

    def compare(self, snapshots: Mapping[str, int], unfinished: Collection[str]) -> None:
        """Removes what a crash has left of unfinished files.

        Args:
            snapshots: every file that there should be, with its size in bytes.
            unfinished: files that were being written or removed.

        Raises:
            StoreError: other files are missing, cut off, or there that should not be.
        """
        ...


class StateIndex:
    """See the module. Used by several threads where the database allows for them.

    Attributes:
        totals: states there are, and the bytes of all snapshots, as of the last heartbeat; with a home, of the last
            change.
    """

    def __init__(
        self,
        database: Database,
        *,
        replica: str,
        budget: Budget,
        lease_s: float | None = None,
        home: SnapshotHome | None = None,
    ) -> None:
        """
        Args:
            replica: this server's id.
            lease_s: after how long without a heartbeat a server is taken for dead; None: there is no other.
            home: None: files are in the database.
        """
        self._database = database
        self._replica = replica
        self._budget = budget
        self._lease_s = lease_s
        self._home = home
        self._last_heartbeat = self._calm_since = 0.0
        self.totals = (0, 0)

    def open(self, left_behind: Collection[str] | None) -> None:
        """Makes the tables if need be, and reaps servers that are known to be gone.

        Args:
            left_behind: servers that are known to be gone; None: all but this one.

        Raises:
            StoreError: the tables cannot be used.
            StoreUnavailableError: the database does not answer.
        """
        with self._database.changing(is_long=True) as transaction:
            ensure_tables(self._database, transaction)
        if self._home is not None:
            self._home.compare(*self._known_files())
        with self._changing(is_long=True) as transaction:
            register(transaction, self._replica, beats=self._lease_s is not None)
            gone = other_replicas(transaction, but=self._replica) if left_behind is None else left_behind
            reap(transaction, gone)
            self.totals = totals(transaction)

    def close(self) -> None:
        """Tells the others that this server is gone."""
        try:
            if self._home is None:
                with self._changing() as transaction:
                    reap(transaction, [self._replica])
        finally:
            self._database.close()

    def reserve(self, files: Collection[str], use: Use, *, held: Collection[str]) -> None:
        """Keeps room for files; raises `StorageFullError`."""
        with self._changing() as transaction:
            register(transaction, self._replica, beats=self._lease_s is not None)
            drop_expired(transaction)
            for file in files:
                note_use(transaction, self._replica, file, use)
            wanted = len(files) * (use.num_bytes + RECORD_BYTES)
            can_fit = wanted <= min(self._budget.max_bytes, self._budget.max_owner_bytes)
            self._make_room(transaction, use.owner, held, can_evict=can_fit)

    def release(self, files: Collection[str]) -> None:
        """Gives back room that `reserve` has kept and that nothing was kept in."""
        if self._home is not None:
            self._home.remove(files)
        with self._changing() as transaction:
            end_uses(transaction, self._replica, files)
            drop_unused(transaction, files)

    def add(self, new: NewState, *, state_id: str) -> StateRecord:
        """Raises `NotFoundError`, `StateConflictError`. May be repeated."""
        with self._changing() as transaction:
            if transaction.row("SELECT 1 FROM states WHERE id = %s", state_id) is None:
                _require_free_name(transaction, new.owner, new.name)
                self._place(transaction, new.head, owner=new.owner)
                insert_state(transaction, new, state_id)
            end_uses(transaction, self._replica, [new.head.file])
            return find_state(transaction, new.owner, state_id)

    def fork(
        self, owner: str, state_id: str, *, point: str | None, fork_id: str, name: str | None, ttl_s: float | None
    ) -> StateRecord:
        """Raises `NotFoundError`, `StateConflictError`."""
        with self._changing() as transaction:
            head = find_state(transaction, owner, state_id).at(point)
            _require_free_name(transaction, owner, name)
            transaction.run("UPDATE states SET used = %s WHERE id = %s", transaction.now, state_id)
            insert_state(transaction, NewState(owner, head, name, state_id, ttl_s), fork_id)
            self._make_room(transaction, owner, [head.file], keep=state_id)
            return find_state(transaction, owner, fork_id)

    def get(self, owner: str, state_id: str) -> StateRecord:
        """Raises `NotFoundError`."""
        with self._database.reading() as transaction:
            return find_state(transaction, owner, state_id)

    def use(self, owner: str, state_id: str) -> StateRecord:
        """Like `get`; notes the use."""
        with self._changing() as transaction:
            find_state(transaction, owner, state_id)
            transaction.run("UPDATE states SET used = %s WHERE id = %s", transaction.now, state_id)
            return find_state(transaction, owner, state_id)

    def list_states(self, owner: str, *, limit: int, after: str | None, name: str | None) -> list[StateRecord]:
        """Newest first."""
        with self._database.reading() as transaction:
            return list_states(transaction, owner, limit=limit, after=after, name=name)

    def delete(self, owner: str, state_id: str) -> None:
        """Raises `NotFoundError`."""
        with self._changing() as transaction:
            find_state(transaction, owner, state_id)
            drop_unused(transaction, delete_states(transaction, "id = %s", state_id))

    def advance(self, record: StateRecord, head: SnapshotRecord) -> StateRecord:
        """Raises `NotFoundError`, `StateConflictError`. May be repeated."""
        with self._changing() as transaction:
            state = find_state(transaction, record.owner, record.id)
            if state.head.file == head.file:
                return state
            if state.head.file != record.head.file:
                raise state_conflict()
            self._place(transaction, head, owner=record.owner)
            end_uses(transaction, self._replica, [head.file])
            return _set_head(transaction, record, head)

    def mark(self, owner: str, state_id: str, point: str) -> StateRecord:
        """Raises `NotFoundError`."""
        with self._changing() as transaction:
            state = find_state(transaction, owner, state_id)
            transaction.run(
                "INSERT INTO points (state, name, created, snapshot) VALUES (%s,%s,%s,%s) ON CONFLICT (state, name) "
                "DO UPDATE SET created = excluded.created, snapshot = excluded.snapshot",
                *(state_id, point, transaction.now, state.head.file),
            )
            drop_unused(transaction, [item.snapshot.file for item in state.points if item.name == point])
            self._make_room(transaction, owner, [state.head.file], keep=state_id)
            return find_state(transaction, owner, state_id)

    def rewind(self, owner: str, state_id: str, point: str) -> StateRecord:
        """Raises `NotFoundError`."""
        with self._changing() as transaction:
            state = find_state(transaction, owner, state_id)
            return _set_head(transaction, state, state.at(point))

    def put_response(self, response: ResponseRecord, *, is_new: bool) -> None:
        """Inserts it, or replaces what is there and has not ended. May be repeated."""
        with self._changing() as transaction:
            row = transaction.row("SELECT snapshot, maker, text_bytes FROM responses WHERE id = %s", response.id)
            if (not is_new) if row is None else row["maker"] is None:
                return
            maker = NOBODY if response.is_put_off else self._replica
            if response.snapshot is not None:
                self._place(transaction, response.snapshot, owner=response.owner)
            num_bytes = write_response(transaction, response, maker=None if response.has_ended else maker)
            end_uses(transaction, self._replica, [] if response.snapshot is None else [response.snapshot.file])
            drop_unused(transaction, [] if row is None or row["snapshot"] is None else [row["snapshot"]])
            # How a response has ended can always be said, if there is not much to say.
            if num_bytes > (0 if row is None else row["text_bytes"] + RECORD_BYTES):
                held = [] if response.snapshot is None else [response.snapshot.file]
                self._make_room(transaction, response.owner, held, keep=response.id)

    def begin_use(self, record_id: str) -> None:
        """A state or response does not expire, for this replica goes on from it."""
        with self._changing() as transaction:
            register(transaction, self._replica, beats=self._lease_s is not None)
            note_use(transaction, self._replica, use_of(record_id))

    def end_use(self, record_id: str, *, is_last: bool) -> None:
        """Its time to live begins again, as soon as nobody goes on from it."""
        with self._changing() as transaction:
            for table in ("states", "responses"):
                transaction.run(f"UPDATE {table} SET used = %s WHERE id = %s", transaction.now, record_id)  # noqa: S608
            if is_last:
                end_uses(transaction, self._replica, [use_of(record_id)])

    def take_up_responses(self, limit: int, *, on_taken: Callable[[Collection[str]], None]) -> list[ResponseRecord]:
        """Those that were put off, and that this replica makes from now on."""
        with self._database.reading() as transaction:
            if transaction.row("SELECT 1 FROM responses WHERE maker = %s", NOBODY) is None:
                return []
        with self._changing() as transaction:
            register(transaction, self._replica, beats=self._lease_s is not None)
            waiting = "id IN (SELECT id FROM responses WHERE maker = %s ORDER BY created LIMIT %s)"
            taken = [response.taken_up() for response in find_responses(transaction, waiting, NOBODY, limit)]
            for response in taken:
                write_response(transaction, response, maker=self._replica)
            on_taken([response.id for response in taken])
            return taken

    def get_response(self, owner: str, response_id: str) -> ResponseRecord:
        """Raises `NotFoundError`."""
        with self._database.reading() as transaction:
            return find_response(transaction, owner, response_id)

    def use_response(self, response_id: str) -> None:
        """Notes that a response was gone on from."""
        with self._changing() as transaction:
            transaction.run("UPDATE responses SET used = %s WHERE id = %s", transaction.now, response_id)

    def cancel_response(self, owner: str, response_id: str) -> ResponseRecord:
        """Raises `NotFoundError`."""
        with self._changing() as transaction:
            response = find_response(transaction, owner, response_id)
            if not response.has_ended:
                write_response(transaction, response.cancelled(), maker=None)
            return find_response(transaction, owner, response_id)

    def delete_response(self, owner: str, response_id: str) -> None:
        """Raises `NotFoundError`."""
        with self._changing() as transaction:
            find_response(transaction, owner, response_id)
            drop_unused(transaction, delete_responses(transaction, "id = %s", response_id))

    def break_off(self, response_id: str) -> None:
        """The response has failed if it has not ended."""
        with self._changing() as transaction:
            break_off(transaction, "id = %s", response_id)

    def heartbeat(self, in_use: Callable[[], InUse]) -> Heartbeat:
        """To be called every few seconds: says that this server lives and what it uses, and tidies up.

        Args:
            in_use: asked while nothing can change, so that nothing is taken for lost that has just begun.
        """
        with self._changing() as transaction:
            mine = in_use()
            register(transaction, self._replica, beats=self._lease_s is not None)
            drop_unused(transaction, note_uses(transaction, self._replica, mine.files))
            break_off(transaction, f"maker = %s AND NOT id {AMONG}", self._replica, json.dumps([*mine.making]))
            if self._lease_s is not None and self._is_calm(transaction.now, self._lease_s):
                reap(transaction, silent_replicas(transaction, transaction.now - self._lease_s))
            drop_expired(transaction)
            self._retire(transaction)
            made = transaction.rows("SELECT id FROM responses WHERE maker = %s", self._replica)
            there = files_among(transaction, mine.copies)
            self.totals = totals(transaction)
            return Heartbeat(
                gone_responses=tuple({*mine.stored} - {row["id"] for row in made}),
                gone_copies=tuple({*mine.copies} - there),
            )

    def sweep(self, files: Collection[str]) -> None:
        """Removes those of the files that nothing refers to any more."""
        with self._database.reading() as transaction:
            unused = unreferenced(transaction, files)
        if unused:
            with self._changing() as transaction:
                drop_unused(transaction, unused)

    def _known_files(self) -> tuple[dict[str, int], set[str]]:
        """Every snapshot's file with its size in bytes, and those that were being written or removed."""
        with self._database.reading() as transaction:
            snapshots = transaction.rows("SELECT file, num_bytes FROM snapshots")
            uses = transaction.rows("SELECT file FROM uses")
        return {row["file"]: row["num_bytes"] for row in snapshots}, {row["file"] for row in uses}

    @contextmanager
    def _changing(self, *, is_long: bool = False) -> Iterator[Transaction]:
        retired: list[str] = []
        with self._database.changing(is_long=is_long) as transaction:
            if transaction.number("SELECT number FROM version") != SCHEMA_VERSION:
                raise StoreUnavailableError("a later version of the program has taken over the store of states")
            yield transaction
            self._retire(transaction)
            retired = transaction.retired
            if self._home is not None:
                self.totals = totals(transaction)
        if self._home is not None and retired:
            self._home.remove(retired)

    def _make_room(
        self,
        transaction: Transaction,
        owner: str,
        held: Collection[str],
        *,
        keep: str = "",
        can_evict: bool = True,
    ) -> None:
        """Evicts what the owner can spare until all fits that the transaction has added.

        Raises:
            StorageFullError: nothing is left to evict; the message is for whoever is over.
        """
        can_evict = can_evict and self._budget.can_evict
        while True:
            self._retire(transaction)
            own = wanted_bytes(transaction, owner)
            everything = wanted_bytes(transaction, None)
            if own <= self._budget.max_owner_bytes and everything <= self._budget.max_bytes:
                return
            if not (can_evict and drop_oldest(transaction, owner, held, keep)):
                break
        if own > self._budget.max_owner_bytes:
            raise owner_full(own, self._budget.max_owner_bytes)
        raise storage_full(everything, self._budget.max_bytes)

    def _retire(self, transaction: Transaction) -> None:
        """Drops snapshots that the transaction has left without a reference."""
        files, transaction.unreferenced = transaction.unreferenced, set()
        if self._home is None:
            if files:
                delete_unreferenced(transaction, files)
            return
        if not (gone := unreferenced(transaction, files - {*self._home.held})):
            return
        delete_unreferenced(transaction, gone)
        for file in gone:
            note_use(transaction, self._replica, file)
        transaction.retired += gone

    def _place(self, transaction: Transaction, snapshot: SnapshotRecord, *, owner: str) -> None:
        """Raises `NotFoundError` if it should be there and is not."""
        if self._home is None:
            require_snapshot(transaction, snapshot)
        else:
            insert_snapshot(transaction, snapshot, owner=owner)

    def _is_calm(self, now: float, lease_s: float) -> bool:
        """Whether the store was there for a whole lease: who could not be heard before is not dead for that."""
        if now - self._last_heartbeat > lease_s / 2:
            self._calm_since = now
        self._last_heartbeat = now
        return now - self._calm_since >= lease_s


def _require_free_name(transaction: Transaction, owner: str, name: str | None) -> None:
    if name is None:
        return
    # A state that has expired and was not swept yet does not hold on to its name.
    drop_expired(transaction)
    if transaction.row("SELECT 1 FROM states WHERE owner = %s AND name = %s", owner, name) is not None:
        raise name_taken(name)


def _set_head(transaction: Transaction, state: StateRecord, head: SnapshotRecord) -> StateRecord:
    """Puts a state elsewhere; what it has left is gone if nothing else refers to it."""
    transaction.run("UPDATE states SET head = %s, used = %s WHERE id = %s", head.file, transaction.now, state.id)
    drop_unused(transaction, [state.head.file])
    return find_state(transaction, state.owner, state.id)
