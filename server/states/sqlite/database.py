"""The embedded store's index: SQLite, one connection, one thread. Every method is one transaction.

It knows which snapshots exist and what refers to them; files are `embedded`'s, beside this. Times are given, so that
nothing here reads a clock.
"""

import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.states.errors import (
    name_taken,
    response_not_found,
    state_conflict,
    state_not_found,
)
from server.states.store import NewState, PointRecord, ResponseRecord, SnapshotRecord, StateRecord, Turn

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE snapshots (
    file TEXT PRIMARY KEY, position INTEGER NOT NULL, pending TEXT NOT NULL, last_token INTEGER NOT NULL,
    turn TEXT NOT NULL, num_bytes INTEGER NOT NULL, fingerprint TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE states (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, name TEXT, parent TEXT,
    created REAL NOT NULL, used REAL NOT NULL, ttl_s REAL, head TEXT NOT NULL REFERENCES snapshots (file),
    UNIQUE (owner, name)
) STRICT;
CREATE TABLE points (
    state TEXT NOT NULL REFERENCES states (id) ON DELETE CASCADE, name TEXT NOT NULL, created REAL NOT NULL,
    snapshot TEXT NOT NULL REFERENCES snapshots (file), PRIMARY KEY (state, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE responses (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL, used REAL NOT NULL, ttl_s REAL,
    body TEXT NOT NULL, input_items TEXT NOT NULL, snapshot TEXT REFERENCES snapshots (file)
) STRICT, WITHOUT ROWID;
CREATE INDEX states_by_head ON states (head);
CREATE INDEX points_by_snapshot ON points (snapshot);
CREATE INDEX responses_by_snapshot ON responses (snapshot);
"""
_UNUSED = """
SELECT file FROM snapshots WHERE NOT EXISTS (SELECT 1 FROM states WHERE head = file)
AND NOT EXISTS (SELECT 1 FROM points WHERE snapshot = file)
AND NOT EXISTS (SELECT 1 FROM responses WHERE snapshot = file)
"""
_OLDEST = """
SELECT 'states' AS kind, id, head AS file, used FROM states
UNION ALL SELECT 'responses', id, snapshot, used FROM responses WHERE snapshot IS NOT NULL ORDER BY used
"""
_ALIVE = "(ttl_s IS NULL OR used + ttl_s > ? OR id IN (SELECT value FROM json_each(?)))"
_DEAD = "used + ttl_s <= ? AND id NOT IN (SELECT value FROM json_each(?))"


class StateDatabase:
    """See the module.

    Attributes:
        in_use: ids of states and responses that do not expire for now.
    """

    in_use: Callable[[], Iterable[str]] = staticmethod(lambda: ())

    def __init__(self, path: Path) -> None:
        """Opens or makes the file.

        Raises:
            sqlite3.DatabaseError: it is damaged, or no database.
            ValueError: another version of this program made it.
        """
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            self._connection.execute(f"PRAGMA {pragma}")
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self._connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise ValueError(f"{path} has version {version}, this program writes {SCHEMA_VERSION}")

    def close(self) -> None:
        self._connection.close()

    def add(self, new: NewState, *, state_id: str, now: float) -> StateRecord:
        """Inserts a state, and its snapshot if that is new; raises `StateConflictError`."""
        with self._transaction():
            self._require_free_name(new.owner, new.name, now)
            self._put_snapshot(new.head)
            self._insert(new, state_id, now)
            return self._state(new.owner, state_id, now)

    def fork(
        self,
        owner: str,
        state_id: str,
        *,
        point: str | None,
        fork_id: str,
        name: str | None,
        ttl_s: float | None,
        now: float,
    ) -> StateRecord:
        """Raises `NotFoundError`, `StateConflictError`."""
        with self._transaction():
            head = self._state(owner, state_id, now).at(point)
            self._require_free_name(owner, name, now)
            self._connection.execute("UPDATE states SET used = ? WHERE id = ?", (now, state_id))
            self._insert(NewState(owner, head, name, state_id, ttl_s), fork_id, now)
            return self._state(owner, fork_id, now)

    def get(self, owner: str, state_id: str, *, now: float) -> StateRecord:
        """Raises `NotFoundError`."""
        return self._state(owner, state_id, now)

    def use(self, owner: str, state_id: str, *, now: float) -> StateRecord:
        """Like `get`; notes the use."""
        with self._transaction():
            self._state(owner, state_id, now)
            self._connection.execute("UPDATE states SET used = ? WHERE id = ?", (now, state_id))
            return self._state(owner, state_id, now)

    def list_states(
        self, owner: str, *, limit: int, after: str | None, name: str | None, now: float
    ) -> list[StateRecord]:
        """Newest first."""
        clauses, values = ["owner = ?", _ALIVE], [owner, *self._until(now)]
        if after is not None:
            self._state(owner, after, now)
            clauses.append("number < (SELECT number FROM states WHERE id = ?)")
            values.append(after)
        if name is not None:
            clauses.append("name = ?")
            values.append(name)
        rows = self._connection.execute(
            f"SELECT * FROM states WHERE {' AND '.join(clauses)} ORDER BY number DESC LIMIT ?",  # noqa: S608 (constants)
            (*values, limit),
        )
        return [self._state_of(row) for row in rows.fetchall()]

    def delete(self, owner: str, state_id: str, *, now: float) -> None:
        """Raises `NotFoundError`."""
        with self._transaction():
            self._state(owner, state_id, now)
            self._connection.execute("DELETE FROM states WHERE id = ?", (state_id,))

    def advance(self, record: StateRecord, head: SnapshotRecord, *, now: float) -> StateRecord:
        """Raises `NotFoundError`, `StateConflictError`."""
        with self._transaction():
            if self._state(record.owner, record.id, now).head.file != record.head.file:
                raise state_conflict()
            self._put_snapshot(head)
            return self._set_head(record.owner, record.id, head.file, now)

    def mark(self, owner: str, state_id: str, point: str, *, now: float) -> StateRecord:
        """Raises `NotFoundError`."""
        with self._transaction():
            state = self._state(owner, state_id, now)
            self._connection.execute(
                "INSERT INTO points (state, name, created, snapshot) VALUES (?,?,?,?) ON CONFLICT (state, name) "
                "DO UPDATE SET created = excluded.created, snapshot = excluded.snapshot",
                (state_id, point, now, state.head.file),
            )
            return self._state(owner, state_id, now)

    def rewind(self, owner: str, state_id: str, point: str, *, now: float) -> StateRecord:
        """Raises `NotFoundError`."""
        with self._transaction():
            head = self._state(owner, state_id, now).at(point)
            return self._set_head(owner, state_id, head.file, now)

    def put_response(self, response: ResponseRecord, *, is_new: bool, now: float) -> None:
        """Inserts it, or replaces what is there and has not ended."""
        with self._transaction():
            row = self._connection.execute("SELECT * FROM responses WHERE id = ?", (response.id,)).fetchone()
            if is_new if row is None else not self._response_of(row).has_ended:
                self._replace_response(response, now)

    def cancel_response(self, owner: str, response_id: str, *, now: float) -> ResponseRecord:
        """Raises `NotFoundError`."""
        with self._transaction():
            response = self.get_response(owner, response_id, now=now)
            if not response.has_ended:
                self._replace_response(response.cancelled(), now)
            return self.get_response(owner, response_id, now=now)

    def take_up_responses(self, limit: int, *, now: float) -> list[ResponseRecord]:
        """Those that were put off, and are not any more."""
        with self._transaction():
            rows = self._connection.execute(
                "SELECT * FROM responses WHERE json_extract(body, '$.status') = 'queued' ORDER BY created LIMIT ?",
                (limit,),
            ).fetchall()
            responses = [self._response_of(row).taken_up() for row in rows]
            for response in responses:
                self._replace_response(response, now)
            return responses

    def break_off(self, response_id: str | None, *, now: float) -> None:
        """The response (None: every one) has failed if it has not ended, unless it is put off."""
        rows = self._connection.execute(
            "SELECT * FROM responses WHERE json_extract(body, '$.status') = 'in_progress' AND coalesce(id = ?, TRUE)",
            (response_id,),
        ).fetchall()
        with self._transaction():
            for row in rows:
                self._replace_response(self._response_of(row).broken_off(), now)

    def get_response(self, owner: str, response_id: str, *, now: float) -> ResponseRecord:
        """Raises `NotFoundError`."""
        row = self._connection.execute(
            f"SELECT * FROM responses WHERE id = ? AND owner = ? AND {_ALIVE}",  # noqa: S608 (constants)
            (response_id, owner, *self._until(now)),
        ).fetchone()
        if row is None:
            raise response_not_found(response_id)
        return self._response_of(row)

    def use_response(self, response_id: str, *, now: float) -> None:
        """Notes that a response was gone on from."""
        with self._transaction():
            self._connection.execute("UPDATE responses SET used = ? WHERE id = ?", (now, response_id))

    def delete_response(self, owner: str, response_id: str, *, now: float) -> None:
        """Raises `NotFoundError`."""
        with self._transaction():
            self.get_response(owner, response_id, now=now)
            self._connection.execute("DELETE FROM responses WHERE id = ?", (response_id,))

    def files(self) -> dict[str, int]:
        """Every snapshot's file and its size in bytes."""
        return {row["file"]: row["num_bytes"] for row in self._connection.execute("SELECT * FROM snapshots")}

    def num_bytes(self) -> int:
        """Of all snapshots."""
        total: int = self._connection.execute("SELECT coalesce(sum(num_bytes), 0) FROM snapshots").fetchone()[0]
        return total

    def num_states(self) -> int:
        """Of all owners."""
        count: int = self._connection.execute("SELECT count(*) FROM states").fetchone()[0]
        return count

    def drop_unused(self, held: Iterable[str]) -> list[str]:
        """Forgets snapshots that nothing refers to and that are not held; their files."""
        with self._transaction():
            unused = {row["file"] for row in self._connection.execute(_UNUSED)} - {*held}
            self._connection.executemany("DELETE FROM snapshots WHERE file = ?", [(file,) for file in unused])
        return sorted(unused)

    def drop_expired(self, *, now: float) -> int:
        """Deletes what has outlived its time; how many."""
        with self._transaction():
            gone = [
                self._connection.execute(f"DELETE FROM {table} WHERE {_DEAD}", self._until(now))  # noqa: S608 (constants)
                for table in ("states", "responses")
            ]
            return sum(cursor.rowcount for cursor in gone)

    def end_use(self, record_id: str, *, now: float) -> None:
        """The time to live of a state or response begins again."""
        with self._transaction():
            for table in ("states", "responses"):
                self._connection.execute(f"UPDATE {table} SET used = ? WHERE id = ?", (now, record_id))  # noqa: S608

    def _until(self, now: float) -> tuple[float, str]:
        """The values of `_ALIVE` and `_DEAD`."""
        return now, json.dumps([*self.in_use()])

    def drop_oldest(self, held: Collection[str]) -> bool:
        """Deletes the state or response that was not used for longest; false if there is none but held ones."""
        with self._transaction():
            row = next((row for row in self._connection.execute(_OLDEST).fetchall() if row["file"] not in held), None)
            if row is None:
                return False
            self._connection.execute(f"DELETE FROM {row['kind']} WHERE id = ?", (row["id"],))  # noqa: S608 (constants)
            return True

    def drop_files(self, files: Iterable[str]) -> None:
        """Forgets snapshots whose files are gone, with all that refers to them."""
        with self._transaction():
            for file in files:
                self._connection.execute("DELETE FROM points WHERE snapshot = ?", (file,))
                self._connection.execute("DELETE FROM states WHERE head = ?", (file,))
                self._connection.execute("UPDATE responses SET snapshot = NULL WHERE snapshot = ?", (file,))
                self._connection.execute("DELETE FROM snapshots WHERE file = ?", (file,))

    def _state(self, owner: str, state_id: str, now: float) -> StateRecord:
        row = self._connection.execute(
            f"SELECT * FROM states WHERE id = ? AND owner = ? AND {_ALIVE}",  # noqa: S608 (constants)
            (state_id, owner, *self._until(now)),
        ).fetchone()
        if row is None:
            raise state_not_found(state_id)
        return self._state_of(row)

    def _state_of(self, row: sqlite3.Row) -> StateRecord:
        points = self._connection.execute("SELECT * FROM points WHERE state = ? ORDER BY created, name", (row["id"],))
        return StateRecord(
            **{key: row[key] for key in ("id", "owner", "name", "parent", "created", "used", "ttl_s")},
            head=self._snapshot(row["head"]),
            points=tuple(
                PointRecord(point["name"], point["created"], self._snapshot(point["snapshot"]))
                for point in points.fetchall()
            ),
        )

    def _insert(self, new: NewState, state_id: str, now: float) -> None:
        self._connection.execute(
            "INSERT INTO states (id, owner, name, parent, created, used, ttl_s, head) VALUES (?,?,?,?,?,?,?,?)",
            (state_id, new.owner, new.name, new.parent, now, now, new.ttl_s, new.head.file),
        )

    def _replace_response(self, response: ResponseRecord, now: float) -> None:
        if response.snapshot is not None:
            self._put_snapshot(response.snapshot)
        self._connection.execute(
            "INSERT OR REPLACE INTO responses VALUES (?,?,?,?,?,?,?,?)",
            (
                response.id,
                response.owner,
                response.created,
                now,
                response.ttl_s,
                json.dumps(response.body),
                json.dumps(response.input_items),
                None if response.snapshot is None else response.snapshot.file,
            ),
        )

    def _response_of(self, row: sqlite3.Row) -> ResponseRecord:
        return ResponseRecord(
            id=row["id"],
            owner=row["owner"],
            created=row["created"],
            ttl_s=row["ttl_s"],
            body=json.loads(row["body"]),
            input_items=tuple(json.loads(row["input_items"])),
            snapshot=None if row["snapshot"] is None else self._snapshot(row["snapshot"]),
        )

    def _snapshot(self, file: str) -> SnapshotRecord:
        row: Any = self._connection.execute("SELECT * FROM snapshots WHERE file = ?", (file,)).fetchone()
        return SnapshotRecord(
            file=row["file"],
            position=row["position"],
            pending=tuple(json.loads(row["pending"])),
            last_token=row["last_token"],
            turn=Turn(row["turn"]),
            num_bytes=row["num_bytes"],
            fingerprint=row["fingerprint"],
        )

    def _put_snapshot(self, snapshot: SnapshotRecord) -> None:
        self._connection.execute(
            "INSERT OR IGNORE INTO snapshots VALUES (?,?,?,?,?,?,?)",
            (
                snapshot.file,
                snapshot.position,
                json.dumps(snapshot.pending),
                snapshot.last_token,
                str(snapshot.turn),
                snapshot.num_bytes,
                snapshot.fingerprint,
            ),
        )

    def _set_head(self, owner: str, state_id: str, file: str, now: float) -> StateRecord:
        self._connection.execute("UPDATE states SET head = ?, used = ? WHERE id = ?", (file, now, state_id))
        return self._state(owner, state_id, now)

    def _require_free_name(self, owner: str, name: str | None, now: float) -> None:
        if name is None:
            return
        # A state that has expired and was not swept yet does not hold on to its name.
        self._connection.execute(f"DELETE FROM states WHERE {_DEAD}", self._until(now))  # noqa: S608 (constants)
        if self._connection.execute("SELECT 1 FROM states WHERE owner = ? AND name = ?", (owner, name)).fetchone():
            raise name_taken(name)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")
