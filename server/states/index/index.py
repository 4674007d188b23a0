"""What a store of states knows: states, responses, which snapshots there are, and who uses what.

Servers change things one after the other, in transactions of milliseconds. A snapshot is gone when nothing refers to it
and no server uses it; what a server uses is forgotten with the server. Times are the database's.

The files of snapshots are beside the index, in a folder of this server alone (`home`), or they are in the same
database, written before anything refers to them. A file in a home is known to the index for as long as it exists: as a
snapshot, or as in use while it is written, and from the commit that drops it until it is removed.
"""

import logging
from collections.abc import Callable, Collection

from server.states.errors import name_taken, state_conflict
from server.states.index.core import IndexCore
from server.states.index.database import Transaction
from server.states.index.rows import (
    delete_responses,
    delete_states,
    find_response,
    find_responses,
    find_state,
    insert_state,
    list_states,
    write_response,
)
from server.states.index.upkeep import NOBODY, RECORD_BYTES, break_off, drop_expired, drop_unused
from server.states.index.uses import end_uses, note_use, register, use_of
from server.states.store import Change, NewState, ResponseRecord, SnapshotRecord, StateRecord

_log = logging.getLogger(__name__)


class StateIndex(IndexCore):
    """See the module. Every method is one transaction, or two."""

    _fingerprint: str | None = None
    """Of the model that the log has told about."""

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
        with self._reading() as transaction:
            return find_state(transaction, owner, state_id)

    def use(self, owner: str, state_id: str) -> StateRecord:
        """Like `get`; notes the use."""
        with self._changing() as transaction:
            find_state(transaction, owner, state_id)
            transaction.run("UPDATE states SET used = %s WHERE id = %s", transaction.now, state_id)
            return find_state(transaction, owner, state_id)

    def list_states(self, owner: str, *, limit: int, after: str | None, name: str | None) -> list[StateRecord]:
        """Newest first."""
        with self._reading() as transaction:
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

    def begin_response(self, response: ResponseRecord) -> bool:
        """Inserts it; false if it is there."""
        with self._changing() as transaction:
            if transaction.row("SELECT 1 FROM responses WHERE id = %s", response.id) is not None:
                return False
            write_response(transaction, response, maker=self._replica)
            self._make_room(transaction, response.owner, [], keep=response.id)
            return True

    def put_response(self, response: ResponseRecord, *, is_new: bool) -> None:
        """Inserts it, or replaces what is there and has not ended. May be repeated."""
        with self._changing() as transaction:
            row = transaction.row("SELECT snapshot, maker, text_bytes FROM responses WHERE id = %s", response.id)
            if (not is_new) if row is None else row["maker"] is None:
                return
            maker = NOBODY if response.is_suspended else self._replica
            if response.snapshot is not None:
                self._place(transaction, response.snapshot, owner=response.owner)
            num_bytes = write_response(transaction, response, maker=None if response.has_ended else maker)
            if response.is_suspended:  # by a server that lives: it is not the response that ends servers
                transaction.run("UPDATE responses SET claims = 0 WHERE id = %s", response.id)
            end_uses(transaction, self._replica, [] if response.snapshot is None else [response.snapshot.file])
            drop_unused(transaction, [] if row is None or row["snapshot"] is None else [row["snapshot"]])
            # How a response has ended can always be said, if there is not much to say.
            if num_bytes > (0 if row is None else row["text_bytes"] + RECORD_BYTES):
                held = [] if response.snapshot is None else [response.snapshot.file]
                self._make_room(transaction, response.owner, held, keep=response.id)

    def begin_use(self, record_id: str) -> None:
        """A state or response does not expire, for this replica goes on from it."""
        with self._changing() as transaction:
            register(transaction, self._replica, heartbeats=self._lease_s is not None)
            note_use(transaction, self._replica, use_of(record_id))

    def end_use(self, record_id: str, *, is_last: bool) -> None:
        """Its time to live begins again, as soon as nobody goes on from it."""
        with self._changing() as transaction:
            for table in ("states", "responses"):
                transaction.run(f"UPDATE {table} SET used = %s WHERE id = %s", transaction.now, record_id)  # noqa: S608
            if is_last:
                end_uses(transaction, self._replica, [use_of(record_id)])

    def claim_responses(
        self, limit: int, *, fingerprint: str, on_taken: Callable[[Collection[str]], None]
    ) -> list[ResponseRecord]:
        """Those that wait, and that this server makes from now on; the first time, the log tells what it cannot use."""
        if fingerprint != self._fingerprint:
            self._tell_of_other_models(fingerprint)
            self._fingerprint = fingerprint
        waiting = "SELECT id FROM responses WHERE maker = %s AND fingerprint IN ('', %s) ORDER BY created LIMIT %s"
        with self._reading() as transaction:
            if not transaction.rows(waiting, NOBODY, fingerprint, 1):
                return []
        with self._changing() as transaction:
            register(transaction, self._replica, heartbeats=self._lease_s is not None)
            found = find_responses(transaction, f"id IN ({waiting})", NOBODY, fingerprint, limit)
            taken = [response.claimed() for response in found]
            for response in taken:
                write_response(transaction, response, maker=self._replica)
                transaction.run("UPDATE responses SET claims = claims + 1 WHERE id = %s", response.id)
            on_taken([response.id for response in taken])
            return taken

    def _tell_of_other_models(self, fingerprint: str) -> None:
        states = "SELECT count(*) AS number FROM states s JOIN snapshots n ON n.file = s.head WHERE n.fingerprint <> %s"
        waiting = "SELECT count(*) AS number FROM responses WHERE maker = %s AND fingerprint NOT IN ('', %s)"
        with self._reading() as transaction:
            counts = transaction.number(states, fingerprint), transaction.number(waiting, NOBODY, fingerprint)
        if any(counts):
            _log.warning(
                "the store has %d states and %d waiting responses that only servers of another model can use", *counts
            )

    def get_response(self, owner: str, response_id: str) -> ResponseRecord:
        """Raises `NotFoundError`."""
        with self._reading() as transaction:
            return find_response(transaction, owner, response_id)

    def use_response(self, response_id: str) -> None:
        """Notes that a response was gone on from."""
        with self._changing() as transaction:
            transaction.run("UPDATE responses SET used = %s WHERE id = %s", transaction.now, response_id)

    def change_response(self, owner: str, response_id: str, change: Change) -> ResponseRecord:
        """Raises `NotFoundError`, `StorageFullError`, and what `change` raises."""
        with self._changing() as transaction:
            response = change(find_response(transaction, owner, response_id))
            write_response(transaction, response, maker=None)
            self._make_room(transaction, owner, [], keep=response_id)
            return response

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
