"""Rows of the shared store as records, and back; each function is a statement or two of the caller's transaction."""

import json
from collections.abc import Collection, Sequence

from server.states.errors import response_not_found, snapshot_gone, state_not_found
from server.states.postgres.connections import Row, Transaction
from server.states.store import NewState, PointRecord, ResponseRecord, SnapshotRecord, StateRecord, Turn

_IS_USED = "EXISTS (SELECT 1 FROM uses u WHERE u.file = 'use of ' || id)"
_IS_MADE = "(maker IS NOT NULL AND maker <> '')"
ALIVE = f"(ttl_s IS NULL OR used + ttl_s > %s OR {_IS_USED})"
ALIVE_RESPONSE = f"({ALIVE} OR {_IS_MADE})"
DEAD = f"used + ttl_s <= %s AND NOT {_IS_USED}"
DEAD_RESPONSE = f"{DEAD} AND NOT {_IS_MADE}"
_STATES = "SELECT s.*, n.* FROM states s JOIN snapshots n ON n.file = s.head"
_POINTS = "SELECT p.*, n.* FROM points p JOIN snapshots n ON n.file = p.snapshot"
_RESPONSES = "SELECT r.*, n.* FROM responses r LEFT JOIN snapshots n ON n.file = r.snapshot"


def use_of(record_id: str) -> str:
    """What stands for a state or response among the files in `uses` while somebody goes on from it."""
    return f"use of {record_id}"


def find_state(transaction: Transaction, owner: str, state_id: str) -> StateRecord:
    """Raises `NotFoundError`."""
    if not _is_text(state_id):
        raise state_not_found(state_id)
    rows = transaction.rows(f"{_STATES} WHERE id = %s AND owner = %s AND {ALIVE}", state_id, owner, transaction.now)
    if not rows:
        raise state_not_found(state_id)
    return _states(transaction, rows)[0]


def list_states(
    transaction: Transaction, owner: str, *, limit: int, after: str | None, name: str | None
) -> list[StateRecord]:
    """Newest first."""
    clauses, values = ["owner = %s", ALIVE], [owner, transaction.now]
    if after is not None:
        find_state(transaction, owner, after)
        clauses.append("number < (SELECT number FROM states WHERE id = %s)")
        values.append(after)
    if name is not None:
        if not _is_text(name):
            return []
        clauses.append("name = %s")
        values.append(name)
    rows = transaction.rows(f"{_STATES} WHERE {' AND '.join(clauses)} ORDER BY number DESC LIMIT %s", *values, limit)
    return _states(transaction, rows)


def insert_state(transaction: Transaction, new: NewState, state_id: str) -> None:
    """Raises `NotFoundError` if its snapshot is not there."""
    require_snapshot(transaction, new.head)
    now = transaction.now
    transaction.run(
        "INSERT INTO states (id, owner, name, parent, created, used, ttl_s, head) VALUES (%s,%s,%s,%s,%s,%s,%s,%s)",
        *(state_id, new.owner, new.name, new.parent, now, now, new.ttl_s, new.head.file),
    )


def delete_states(transaction: Transaction, condition: str, *values: object) -> list[str]:
    """Deletes states of which a condition is true; the snapshots that they had."""
    chosen = f"SELECT id FROM states WHERE {condition}"  # noqa: S608 (constants)
    marked = transaction.rows(f"SELECT snapshot AS file FROM points WHERE state IN ({chosen})", *values)  # noqa: S608
    heads = transaction.rows(f"DELETE FROM states WHERE id IN ({chosen}) RETURNING head AS file", *values)  # noqa: S608
    return [row["file"] for row in (*heads, *marked)]


def find_response(transaction: Transaction, owner: str, response_id: str) -> ResponseRecord:
    """Raises `NotFoundError`."""
    if not _is_text(response_id):
        raise response_not_found(response_id)
    condition = f"id = %s AND owner = %s AND {ALIVE_RESPONSE}"
    found = find_responses(transaction, condition, response_id, owner, transaction.now)
    if not found:
        raise response_not_found(response_id)
    return found[0]


def find_responses(transaction: Transaction, condition: str, *values: object) -> list[ResponseRecord]:
    """All of which a condition is true."""
    return [_response(row) for row in transaction.rows(f"{_RESPONSES} WHERE {condition}", *values)]


def write_response(transaction: Transaction, response: ResponseRecord, *, maker: str | None) -> None:
    """Inserts or replaces; raises `NotFoundError` if its snapshot is not there."""
    if response.snapshot is not None:
        require_snapshot(transaction, response.snapshot)
    transaction.run(
        "INSERT INTO responses (id, owner, created, used, ttl_s, body, input_items, snapshot, maker) "
        "VALUES (%s,%s,%s,%s,%s,%s,%s,%s,%s) ON CONFLICT (id) DO UPDATE SET used = excluded.used, "
        "body = excluded.body, input_items = excluded.input_items, snapshot = excluded.snapshot, "
        "maker = excluded.maker",
        *(response.id, response.owner, response.created, transaction.now, response.ttl_s),
        *(json.dumps(response.body), json.dumps(response.input_items)),
        *(None if response.snapshot is None else response.snapshot.file, maker),
    )


def delete_responses(transaction: Transaction, condition: str, *values: object) -> list[str]:
    """Deletes responses of which a condition is true; the snapshots that they had."""
    statement = f"DELETE FROM responses WHERE {condition} RETURNING snapshot"  # noqa: S608 (constants)
    rows = transaction.rows(statement, *values)
    return [row["snapshot"] for row in rows if row["snapshot"] is not None]


def insert_snapshot(transaction: Transaction, snapshot: SnapshotRecord) -> bool:
    """Without its content; false if it is there."""
    inserted = transaction.run(
        "INSERT INTO snapshots (file, position, pending, last_token, turn, num_bytes, fingerprint) "
        "VALUES (%s,%s,%s,%s,%s,%s,%s) ON CONFLICT DO NOTHING",
        *(snapshot.file, snapshot.position, json.dumps(snapshot.pending), snapshot.last_token),
        *(str(snapshot.turn), snapshot.num_bytes, snapshot.fingerprint),
    )
    return inserted > 0


def require_snapshot(transaction: Transaction, snapshot: SnapshotRecord) -> None:
    """Raises `NotFoundError`."""
    if transaction.row("SELECT 1 FROM snapshots WHERE file = %s", snapshot.file) is None:
        raise snapshot_gone()


def drop_unused(transaction: Transaction, files: Collection[str] | None) -> None:
    """Removes those of the snapshots (None: of all) that nothing refers to and nobody uses."""
    if files is not None and not files:
        return
    transaction.run(
        "DELETE FROM snapshots n WHERE (%s::text[] IS NULL OR file = ANY(%s)) "
        "AND NOT EXISTS (SELECT 1 FROM states WHERE head = n.file) "
        "AND NOT EXISTS (SELECT 1 FROM points WHERE snapshot = n.file) "
        "AND NOT EXISTS (SELECT 1 FROM responses WHERE snapshot = n.file) "
        "AND NOT EXISTS (SELECT 1 FROM uses u WHERE u.file = n.file)",
        *([None, None] if files is None else [[*files], [*files]]),
    )


def _states(transaction: Transaction, rows: Sequence[Row]) -> list[StateRecord]:
    ids = [row["id"] for row in rows]
    points: dict[str, list[PointRecord]] = {state_id: [] for state_id in ids}
    for row in transaction.rows(f"{_POINTS} WHERE state = ANY(%s) ORDER BY created, name", ids):
        points[row["state"]].append(PointRecord(row["name"], row["created"], _snapshot(row)))
    return [
        StateRecord(
            **{key: row[key] for key in ("id", "owner", "name", "parent", "created", "used", "ttl_s")},
            head=_snapshot(row),
            points=tuple(points[row["id"]]),
        )
        for row in rows
    ]


def _response(row: Row) -> ResponseRecord:
    return ResponseRecord(
        **{key: row[key] for key in ("id", "owner", "created", "ttl_s")},
        body=json.loads(row["body"]),
        input_items=tuple(json.loads(row["input_items"])),
        snapshot=None if row["file"] is None else _snapshot(row),
    )


def _snapshot(row: Row) -> SnapshotRecord:
    return SnapshotRecord(
        **{key: row[key] for key in ("file", "position", "last_token", "num_bytes", "fingerprint")},
        pending=tuple(json.loads(row["pending"])),
        turn=Turn(row["turn"]),
    )


def _is_text(value: str) -> bool:
    """Whether it can be in the store at all: PostgreSQL has neither NUL nor halves of surrogate pairs."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
