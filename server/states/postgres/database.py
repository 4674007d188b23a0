"""What the shared store does in PostgreSQL: states, responses, the snapshots' content, and who uses what.

Replicas change things one after the other, in transactions of milliseconds under one lock; content is written before,
in a transaction of its own, and seen by nobody until something refers to it. A snapshot is removed when nothing refers
to it and no replica uses it; what a replica uses is forgotten with the replica. Times are the server's.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from server.states.errors import StoreUnavailableError, name_taken, snapshot_gone, state_conflict, storage_full
from server.states.postgres.connections import Postgres, Transaction
from server.states.postgres.rows import (
    delete_responses,
    delete_states,
    drop_unused,
    find_response,
    find_responses,
    find_state,
    insert_snapshot,
    insert_state,
    list_states,
    require_snapshot,
    use_of,
    write_response,
)
from server.states.postgres.schema import CHUNK_BYTES, ensure_tables
from server.states.postgres.upkeep import (
    break_off,
    bury,
    dead_replicas,
    drop_expired,
    drop_oldest,
    totals,
    wanted_bytes,
)
from server.states.store import NewState, ResponseRecord, SnapshotRecord, StateRecord

NOBODY = ""
"""The maker of a response that was put off: whoever takes it up."""


@dataclass(frozen=True, slots=True)
class InUse:
    """What this replica uses just now.

    Attributes:
        files: those that it writes, with the bytes that are kept free for each, and those that it reads, with 0.
        making: responses that are being made here.
        stored: those of them that are in the store since.
        copies: files that are here and not used.
    """

    files: Mapping[str, int]
    making: Collection[str]
    stored: Collection[str]
    copies: Collection[str]


@dataclass(frozen=True, slots=True)
class Beat:
    """What a replica learns when it is heard.

    Attributes:
        gone_responses: which it makes, and which were cancelled or deleted elsewhere.
        gone_copies: files that the store has no more.
    """

    num_states: int
    num_bytes: int
    gone_responses: tuple[str, ...]
    gone_copies: tuple[str, ...]


class SharedDatabase:
    """See the module. Used by several threads."""

    def __init__(self, postgres: Postgres, *, replica: str, lease_s: float) -> None:
        """
        Args:
            replica: this server's id.
            lease_s: after how long without a beat a replica is taken for dead.
        """
        self._postgres = postgres
        self._replica = replica
        self._lease_s = lease_s
        self._beaten = self._calm_since = 0.0

    def open(self, schema: str, left_behind: Collection[str]) -> tuple[int, int]:
        """Makes the tables if need be, and buries replicas that are known to be gone; states and bytes there are.

        Raises:
            StoreError: the tables cannot be used.
            StoreUnavailableError: the server does not answer.
        """
        try:
            with self._postgres.changing() as transaction:
                ensure_tables(transaction, schema)
                self._register(transaction)
                bury(transaction, left_behind)
                return totals(transaction)
        except BaseException:
            self._postgres.close()
            raise

    def close(self) -> None:
        """Tells the others that this replica is gone."""
        try:
            with self._postgres.changing() as transaction:
                bury(transaction, [self._replica])
        finally:
            self._postgres.close()

    def reserve(
        self, files: Collection[str], *, bytes_each: int, max_bytes: int, can_evict: bool, held: Collection[str]
    ) -> None:
        """Keeps room for files; raises `StorageFullError`."""
        with self._postgres.changing() as transaction:
            self._register(transaction)
            drop_expired(transaction)
            for file in files:
                # A beat may have noted it already.
                transaction.run(
                    "INSERT INTO uses VALUES (%s,%s,%s) ON CONFLICT (file, replica) DO UPDATE SET num_bytes = %s",
                    *(file, self._replica, bytes_each, bytes_each),
                )
            can_evict = can_evict and len(files) * bytes_each <= max_bytes
            while (wanted := wanted_bytes(transaction)) > max_bytes:
                if not (can_evict and drop_oldest(transaction, held)):
                    raise storage_full(wanted, max_bytes)

    def release(self, files: Collection[str]) -> None:
        """Gives back room that `reserve` has kept and that nothing was kept in."""
        with self._postgres.changing() as transaction:
            self._end_uses(transaction, files)
            drop_unused(transaction, files)

    def upload(self, snapshot: SnapshotRecord, path: Path) -> None:
        """Writes a snapshot, wholly or not at all; nothing refers to it yet. May be repeated.

        Raises:
            OSError: the file cannot be read.
            StoreUnavailableError: no room is kept for it (any more).
        """
        with path.open("rb") as file, self._postgres.adding() as transaction:
            if not insert_snapshot(transaction, snapshot):
                return
            with transaction.cursor.copy("COPY chunks (file, number, data) FROM STDIN (FORMAT BINARY)") as copy:
                copy.set_types(["text", "int4", "bytea"])
                number = 0
                while chunk := file.read(CHUNK_BYTES):
                    copy.write_row((snapshot.file, number, chunk))
                    number += 1
            # Whoever gives up the room removes what is in it: after this, or this is not to be.
            kept = "SELECT 1 FROM uses WHERE file = %s AND replica = %s FOR SHARE"
            if transaction.row(kept, snapshot.file, self._replica) is None:
                raise StoreUnavailableError

    def content(self, snapshot: SnapshotRecord) -> Iterator[bytes]:
        """A snapshot's file in pieces, as of one moment; raises `NotFoundError` before the first."""
        with self._postgres.reading() as transaction:
            number = num_bytes = 0
            statement = b"SELECT data FROM chunks WHERE file = %s AND number = %s"
            while num_bytes < snapshot.num_bytes:
                row = transaction.cursor.execute(statement, (snapshot.file, number), binary=True).fetchone()
                if row is None:
                    raise snapshot_gone()
                yield row["data"]
                number, num_bytes = number + 1, num_bytes + len(row["data"])

    def add(self, new: NewState, *, state_id: str) -> StateRecord:
        """Raises `NotFoundError`, `StateConflictError`. May be repeated."""
        with self._postgres.changing() as transaction:
            if transaction.row("SELECT 1 FROM states WHERE id = %s", state_id) is None:
                _require_free_name(transaction, new.owner, new.name)
                insert_state(transaction, new, state_id)
            self._end_uses(transaction, [new.head.file])
            return find_state(transaction, new.owner, state_id)

    def fork(
        self, owner: str, state_id: str, *, point: str | None, fork_id: str, name: str | None, ttl_s: float | None
    ) -> StateRecord:
        """Raises `NotFoundError`, `StateConflictError`."""
        with self._postgres.changing() as transaction:
            head = find_state(transaction, owner, state_id).at(point)
            _require_free_name(transaction, owner, name)
            transaction.run("UPDATE states SET used = %s WHERE id = %s", transaction.now, state_id)
            insert_state(transaction, NewState(owner, head, name, state_id, ttl_s), fork_id)
            return find_state(transaction, owner, fork_id)

    def get(self, owner: str, state_id: str) -> StateRecord:
        """Raises `NotFoundError`."""
        with self._postgres.reading() as transaction:
            return find_state(transaction, owner, state_id)

    def use(self, owner: str, state_id: str) -> StateRecord:
        """Like `get`; notes the use."""
        with self._postgres.changing() as transaction:
            find_state(transaction, owner, state_id)
            transaction.run("UPDATE states SET used = %s WHERE id = %s", transaction.now, state_id)
            return find_state(transaction, owner, state_id)

    def list_states(self, owner: str, *, limit: int, after: str | None, name: str | None) -> list[StateRecord]:
        """Newest first."""
        with self._postgres.reading() as transaction:
            return list_states(transaction, owner, limit=limit, after=after, name=name)

    def delete(self, owner: str, state_id: str) -> None:
        """Raises `NotFoundError`."""
        with self._postgres.changing() as transaction:
            find_state(transaction, owner, state_id)
            drop_unused(transaction, delete_states(transaction, "id = %s", state_id))

    def advance(self, record: StateRecord, head: SnapshotRecord) -> StateRecord:
        """Raises `NotFoundError`, `StateConflictError`. May be repeated."""
        with self._postgres.changing() as transaction:
            state = find_state(transaction, record.owner, record.id)
            if state.head.file == head.file:
                return state
            if state.head.file != record.head.file:
                raise state_conflict()
            self._end_uses(transaction, [head.file])
            return _set_head(transaction, record, head)

    def mark(self, owner: str, state_id: str, point: str) -> StateRecord:
        """Raises `NotFoundError`."""
        with self._postgres.changing() as transaction:
            state = find_state(transaction, owner, state_id)
            transaction.run(
                "INSERT INTO points (state, name, created, snapshot) VALUES (%s,%s,%s,%s) ON CONFLICT (state, name) "
                "DO UPDATE SET created = excluded.created, snapshot = excluded.snapshot",
                *(state_id, point, transaction.now, state.head.file),
            )
            drop_unused(transaction, [item.snapshot.file for item in state.points if item.name == point])
            return find_state(transaction, owner, state_id)

    def rewind(self, owner: str, state_id: str, point: str) -> StateRecord:
        """Raises `NotFoundError`."""
        with self._postgres.changing() as transaction:
            state = find_state(transaction, owner, state_id)
            return _set_head(transaction, state, state.at(point))

    def put_response(self, response: ResponseRecord, *, is_new: bool) -> None:
        """Inserts it, or replaces what is there and has not ended. May be repeated."""
        with self._postgres.changing() as transaction:
            row = transaction.row("SELECT snapshot, maker FROM responses WHERE id = %s", response.id)
            if (not is_new) if row is None else row["maker"] is None:
                return
            maker = NOBODY if response.is_put_off else self._replica
            write_response(transaction, response, maker=None if response.has_ended else maker)
            self._end_uses(transaction, [] if response.snapshot is None else [response.snapshot.file])
            drop_unused(transaction, [] if row is None or row["snapshot"] is None else [row["snapshot"]])

    def begin_use(self, record_id: str) -> None:
        """A state or response does not expire, for this replica goes on from it."""
        with self._postgres.changing() as transaction:
            self._register(transaction)
            transaction.run(
                "INSERT INTO uses VALUES (%s,%s,0) ON CONFLICT DO NOTHING", use_of(record_id), self._replica
            )

    def end_use(self, record_id: str, *, is_last: bool) -> None:
        """Its time to live begins again, as soon as nobody goes on from it."""
        with self._postgres.changing() as transaction:
            for table in ("states", "responses"):
                transaction.run(f"UPDATE {table} SET used = %s WHERE id = %s", transaction.now, record_id)  # noqa: S608
            if is_last:
                self._end_uses(transaction, [use_of(record_id)])

    def take_up_responses(self, limit: int, *, on_taken: Callable[[Collection[str]], None]) -> list[ResponseRecord]:
        """Those that were put off, and that this replica makes from now on."""
        with self._postgres.reading() as transaction:
            if transaction.row("SELECT 1 FROM responses WHERE maker = %s", NOBODY) is None:
                return []
        with self._postgres.changing() as transaction:
            self._register(transaction)
            waiting = "id IN (SELECT id FROM responses WHERE maker = %s ORDER BY created LIMIT %s)"
            taken = [response.taken_up() for response in find_responses(transaction, waiting, NOBODY, limit)]
            for response in taken:
                write_response(transaction, response, maker=self._replica)
            on_taken([response.id for response in taken])
            return taken

    def get_response(self, owner: str, response_id: str) -> ResponseRecord:
        """Raises `NotFoundError`."""
        with self._postgres.reading() as transaction:
            return find_response(transaction, owner, response_id)

    def use_response(self, response_id: str) -> None:
        """Notes that a response was gone on from."""
        with self._postgres.changing() as transaction:
            transaction.run("UPDATE responses SET used = %s WHERE id = %s", transaction.now, response_id)

    def cancel_response(self, owner: str, response_id: str) -> ResponseRecord:
        """Raises `NotFoundError`."""
        with self._postgres.changing() as transaction:
            response = find_response(transaction, owner, response_id)
            if not response.has_ended:
                write_response(transaction, response.cancelled(), maker=None)
            return find_response(transaction, owner, response_id)

    def delete_response(self, owner: str, response_id: str) -> None:
        """Raises `NotFoundError`."""
        with self._postgres.changing() as transaction:
            find_response(transaction, owner, response_id)
            drop_unused(transaction, delete_responses(transaction, "id = %s", response_id))

    def break_off(self, response_id: str) -> None:
        """The response has failed if it has not ended."""
        with self._postgres.changing() as transaction:
            break_off(transaction, "id = %s", response_id)

    def beat(self, in_use: Callable[[], InUse]) -> Beat:
        """To be called every few seconds: says that this replica lives and what it uses, and tidies up.

        Args:
            in_use: asked while nothing can change, so that nothing is taken for lost that has just begun.
        """
        with self._postgres.changing() as transaction:
            mine = in_use()
            self._register(transaction)
            dropped = self._note_uses(transaction, mine.files)
            break_off(transaction, "maker = %s AND NOT id = ANY(%s)", self._replica, [*mine.making])
            if self._is_calm(transaction.now):
                bury(transaction, dead_replicas(transaction, transaction.now - self._lease_s))
            drop_expired(transaction)
            drop_unused(transaction, dropped)
            made = transaction.rows("SELECT id FROM responses WHERE maker = %s", self._replica)
            there = transaction.rows("SELECT file FROM snapshots WHERE file = ANY(%s)", [*mine.copies])
            return Beat(
                *totals(transaction),
                gone_responses=tuple({*mine.stored} - {row["id"] for row in made}),
                gone_copies=tuple({*mine.copies} - {row["file"] for row in there}),
            )

    def _register(self, transaction: Transaction) -> None:
        transaction.run(
            "INSERT INTO replicas VALUES (%s,%s) ON CONFLICT (id) DO UPDATE SET beat = excluded.beat",
            *(self._replica, transaction.now),
        )

    def _end_uses(self, transaction: Transaction, files: Collection[str]) -> None:
        transaction.run("DELETE FROM uses WHERE replica = %s AND file = ANY(%s)", self._replica, [*files])

    def _note_uses(self, transaction: Transaction, files: Mapping[str, int]) -> list[str]:
        """Writes down what this replica uses; what it uses no more."""
        rows = transaction.rows(
            "DELETE FROM uses WHERE replica = %s AND NOT file = ANY(%s) RETURNING file", self._replica, [*files]
        )
        transaction.run(
            "INSERT INTO uses SELECT file, %s, num_bytes FROM unnest(%s::text[], %s::bigint[]) AS f (file, num_bytes) "
            "ON CONFLICT DO NOTHING",
            *(self._replica, [*files], [*files.values()]),
        )
        return [row["file"] for row in rows]

    def _is_calm(self, now: float) -> bool:
        """Whether the store was there for a whole lease: who could not be heard before is not dead for that."""
        if now - self._beaten > self._lease_s / 2:
            self._calm_since = now
        self._beaten = now
        return now - self._calm_since >= self._lease_s


def _require_free_name(transaction: Transaction, owner: str, name: str | None) -> None:
    if name is None:
        return
    # A state that has expired and was not swept yet does not hold on to its name.
    drop_expired(transaction)
    if transaction.row("SELECT 1 FROM states WHERE owner = %s AND name = %s", owner, name) is not None:
        raise name_taken(name)


def _set_head(transaction: Transaction, state: StateRecord, head: SnapshotRecord) -> StateRecord:
    """Puts a state elsewhere, and removes what it has left if nothing else refers to that; raises `NotFoundError`."""
    require_snapshot(transaction, head)
    transaction.run("UPDATE states SET head = %s, used = %s WHERE id = %s", head.file, transaction.now, state.id)
    drop_unused(transaction, [state.head.file])
    return find_state(transaction, state.owner, state.id)
