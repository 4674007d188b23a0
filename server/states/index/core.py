"""The core of the index: its transactions, whose room is used up, and what becomes of files that nothing refers to."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from server.states.clock import ClockWatch
from server.states.errors import StoreUnavailableError, owner_full, storage_full
from server.states.index.database import AMONG, Database, Transaction
from server.states.index.rows import (
    delete_unreferenced,
    files_among,
    insert_snapshot,
    require_snapshot,
    unreferenced,
)
from server.states.index.schema import SCHEMA_VERSION, ensure_tables
from server.states.index.upkeep import (
    RECORD_BYTES,
    Budget,
    break_off,
    drop_expired,
    drop_oldest,
    drop_unused,
    follow_step,
    newest_use,
    other_replicas,
    reap,
    silent_replicas,
    totals,
    wanted_bytes,
)
from server.states.index.uses import Heartbeat, InUse, Use, end_uses, files_with_room, note_use, note_uses, register
from server.states.store import SnapshotRecord


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


class IndexCore:
    """Used by several threads where the database allows for them.

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
        watch: ClockWatch | None = None,
    ) -> None:
        """
        Args:
            replica: this server's id.
            lease_s: after how long without a heartbeat a server is taken for dead; None: there is no other.
            home: None: files are in the database.
            watch: of the database's clock.
        """
        self._database = database
        self._replica = replica
        self._budget = budget
        self._lease_s = lease_s
        self._home = home
        self._watch = ClockWatch() if watch is None else watch
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
            newest = newest_use(transaction)
            self._watch.begin(transaction.now, newest)
            if newest is not None and newest > transaction.now:
                follow_step(transaction, transaction.now - newest)
            register(transaction, self._replica, heartbeats=self._lease_s is not None)
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
            register(transaction, self._replica, heartbeats=self._lease_s is not None)
            drop_expired(transaction)
            for file in files:
                note_use(transaction, self._replica, file, use)
            wanted = len(files) * (use.num_bytes + RECORD_BYTES)
            can_fit = wanted <= min(self._budget.max_bytes, self._budget.max_owner_bytes)
            self._make_room(transaction, use.owner, held, can_evict=can_fit)

    def release(self, files: Collection[str]) -> None:
        """Gives back room that `reserve` has kept; files that became snapshots meanwhile stay, the others are gone."""
        with self._changing() as transaction:
            self._give_back(transaction, files)

    def heartbeat(self, in_use: Callable[[], InUse]) -> Heartbeat:
        """To be called every few seconds: says that this server lives and what it uses, and tidies up.

        Args:
            in_use: asked while nothing can change, so that nothing is taken for lost that has just begun.
        """
        with self._changing() as transaction:
            mine = in_use()
            register(transaction, self._replica, heartbeats=self._lease_s is not None)
            rooms = files_with_room(transaction, self._replica) - mine.files.keys()
            drop_unused(transaction, note_uses(transaction, self._replica, mine.files))
            self._give_back(transaction, rooms)  # what `release` could not tell
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
        with self._reading() as transaction:
            unused = unreferenced(transaction, files)
        if unused:
            with self._changing() as transaction:
                drop_unused(transaction, unused)

    def _known_files(self) -> tuple[dict[str, int], set[str]]:
        """Every snapshot's file with its size in bytes, and those that were being written or removed."""
        with self._reading() as transaction:
            snapshots = transaction.rows("SELECT file, num_bytes FROM snapshots")
            uses = transaction.rows("SELECT file FROM uses")
        return {row["file"]: row["num_bytes"] for row in snapshots}, {row["file"] for row in uses}

    @contextmanager
    def _reading(self) -> Iterator[Transaction]:
        with self._database.reading() as transaction:
            has_stepped = self._watch.step(transaction.now) != 0
            transaction.horizon -= self._watch.doubted_s()
            if not has_stepped:
                yield transaction
        if has_stepped:
            with self._changing() as transaction:
                yield transaction

    @contextmanager
    def _changing(self, *, is_long: bool = False) -> Iterator[Transaction]:
        retired: list[str] = []
        with self._database.changing(is_long=is_long) as transaction:
            now, step_s = transaction.now, self._watch.step(transaction.now)
            transaction.horizon -= self._watch.doubted_s()
            if step_s != 0:
                follow_step(transaction, step_s)
            if transaction.number("SELECT number FROM version") != SCHEMA_VERSION:
                raise StoreUnavailableError("a later version of the program has taken over the store of states")
            yield transaction
            self._retire(transaction)
            retired = transaction.retired
            if self._home is not None:
                self.totals = totals(transaction)
        self._watch.note(now)
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
        self._withdraw(transaction, gone)

    def _give_back(self, transaction: Transaction, files: Collection[str]) -> None:
        end_uses(transaction, self._replica, files)
        drop_unused(transaction, files)
        if self._home is not None:
            self._withdraw(transaction, {*files} - files_among(transaction, files))

    def _withdraw(self, transaction: Transaction, files: Collection[str]) -> None:
        """Files without a snapshot go with the commit; a use tells of them in case of a crash before that."""
        for file in files:
            note_use(transaction, self._replica, file)
        transaction.retired += files

    def _place(self, transaction: Transaction, snapshot: SnapshotRecord, *, owner: str) -> None:
        """Raises `NotFoundError` if it should be there and is not, or its room was given back meanwhile."""
        if self._home is not None and snapshot.file in files_with_room(transaction, self._replica):
            insert_snapshot(transaction, snapshot, owner=owner)
        else:
            require_snapshot(transaction, snapshot)

    def _is_calm(self, now: float, lease_s: float) -> bool:
        """Whether the store was there for a whole lease: who could not be heard before is not dead for that."""
        if now - self._last_heartbeat > lease_s / 2:
            self._calm_since = now
        self._last_heartbeat = now
        return now - self._calm_since >= lease_s
