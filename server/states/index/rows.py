"""Rows of the index as records, and back; each function is a statement or two of the caller's transaction."""

import json
from collections.abc import Collection, Sequence

from server.states.errors import response_not_found, snapshot_gone, state_not_found
from server.states.index.database import AMONG, Row, Transaction
from server.states.store import (
    CURSOR_PREFIX,
    NewState,
    PointRecord,
    ResponseRecord,
    SnapshotRecord,
    StateRecord,
    TurnEnd,
)

MAX_CURSOR_DIGITS = 16
_IS_USED = "EXISTS (SELECT 1 FROM uses WHERE uses.file = 'use of ' || id)"
_IS_MADE = "(maker IS NOT NULL AND maker <> '')"
ALIVE = f"(ttl_s IS NULL OR used + ttl_s > %s OR {_IS_USED})"
ALIVE_RESPONSE = f"({ALIVE} OR {_IS_MADE})"
DEAD = f"used + ttl_s <= %s AND NOT {_IS_USED}"
DEAD_RESPONSE = f"{DEAD} AND NOT {_IS_MADE}"
UNREFERENCED = (
    "NOT EXISTS (SELECT 1 FROM states WHERE head = n.file) "
    "AND NOT EXISTS (SELECT 1 FROM points WHERE snapshot = n.file) "
    "AND NOT EXISTS (SELECT 1 FROM responses WHERE snapshot = n.file) "
    "AND NOT EXISTS (SELECT 1 FROM uses WHERE uses.file = n.file)"
)
_SNAPSHOT = "n.file, n.position, n.pending, n.last_token, n.turn, n.num_bytes, n.fingerprint, n.held_by"
_STATES = f"SELECT s.*, {_SNAPSHOT} FROM states AS s JOIN snapshots AS n ON n.file = s.head"  # noqa: S608
_POINTS = f"SELECT p.*, {_SNAPSHOT} FROM points AS p JOIN snapshots AS n ON n.file = p.snapshot"  # noqa: S608
_RESPONSES = (
    f"SELECT r.id, r.owner, r.created, r.ttl_s, r.body, r.input_items, r.fingerprint AS made_by, {_SNAPSHOT} "  # noqa: S608
    "FROM responses AS r LEFT JOIN snapshots AS n ON n.file = r.snapshot"
)


def find_state(transaction: Transaction, owner: str, state_id: str) -> StateRecord:
    """Raises `NotFoundError`."""
    if not _is_text(state_id):
        raise state_not_found(state_id)
    condition = f"id = %s AND s.owner = %s AND {ALIVE}"
    rows = transaction.rows(f"{_STATES} WHERE {condition}", state_id, owner, transaction.horizon)
    if not rows:
        raise state_not_found(state_id)
    return _states(transaction, rows)[0]


def list_states(
    transaction: Transaction, owner: str, *, limit: int, after: str | None, name: str | None
) -> list[StateRecord]:
    """Newest first."""
    clauses: list[str] = ["s.owner = %s", ALIVE]
    values: list[object] = [owner, transaction.horizon]
    if after is not None:
        clauses.append("number < %s")
        values.append(_number_of(transaction, owner, after))
    if name is not None:
        if not _is_text(name):
            return []
        clauses.append("name = %s")
        values.append(name)
    rows = transaction.rows(f"{_STATES} WHERE {' AND '.join(clauses)} ORDER BY number DESC LIMIT %s", *values, limit)
    return _states(transaction, rows)


def _number_of(transaction: Transaction, owner: str, after: str) -> int:
    """Of the state of an id, or of the one that a cursor was made for; raises `NotFoundError`."""
    digits = after.removeprefix(CURSOR_PREFIX)
    if digits != after and 0 < len(digits) < MAX_CURSOR_DIGITS and not {*digits} - {*"0123456789abcdef"}:
        return int(digits, 16)
    return find_state(transaction, owner, after).number


def insert_state(transaction: Transaction, new: NewState, state_id: str) -> None:
    """Its snapshot is there."""
    now = transaction.now
    transaction.run(
        "INSERT INTO states (id, owner, name, parent, created, used, ttl_s, head) VALUES (%s,%s,%s,%s,%s,%s,%s,%s)",
        *(state_id, new.owner, new.name, new.parent, now, now, new.ttl_s, new.head.file),
    )


def delete_states(transaction: Transaction, condition: str, *values: object) -> list[str]:
    """Deletes states of which a condition is true; the snapshots that they had."""
    chosen = f"SELECT id FROM states WHERE {condition}"  # noqa: S608 (constants)
    marked = transaction.rows(f"SELECT snapshot AS file FROM points WHERE state IN ({chosen})", *values)  # noqa: S608
    heads = transaction.rows(f"DELETE FROM states WHERE {condition} RETURNING head AS file", *values)  # noqa: S608
    return [row["file"] for row in (*heads, *marked)]


def find_response(transaction: Transaction, owner: str, response_id: str) -> ResponseRecord:
    """Raises `NotFoundError`."""
    if not _is_text(response_id):
        raise response_not_found(response_id)
    condition = f"id = %s AND r.owner = %s AND {ALIVE_RESPONSE}"
    found = find_responses(transaction, condition, response_id, owner, transaction.horizon)
    if not found:
        raise response_not_found(response_id)
    return found[0]


def find_responses(transaction: Transaction, condition: str, *values: object) -> list[ResponseRecord]:
    """All of which a condition is true."""
    return [_response(row) for row in transaction.rows(f"{_RESPONSES} WHERE {condition}", *values)]


def write_response(transaction: Transaction, response: ResponseRecord, *, maker: str | None) -> int:
    """Inserts or replaces; its snapshot is there. The bytes of its texts."""
    body, items = json.dumps(response.body), json.dumps(response.input_items)
    transaction.run(
        "INSERT INTO responses "
        "(id, owner, created, used, ttl_s, body, input_items, snapshot, maker, text_bytes, fingerprint, claims) "
        "VALUES (%s,%s,%s,%s,%s,%s,%s,%s,%s,%s,%s,0) ON CONFLICT (id) DO UPDATE SET used = excluded.used, "
        "body = excluded.body, input_items = excluded.input_items, snapshot = excluded.snapshot, "
        "maker = excluded.maker, text_bytes = excluded.text_bytes, fingerprint = excluded.fingerprint",
        *(response.id, response.owner, response.created, transaction.now, response.ttl_s, body, items),
        *(None if response.snapshot is None else response.snapshot.file, maker, len(body) + len(items)),
        response.fingerprint,
    )
    return len(body) + len(items)


def delete_responses(transaction: Transaction, condition: str, *values: object) -> list[str]:
    """Deletes responses of which a condition is true; the snapshots that they had."""
    statement = f"DELETE FROM responses WHERE {condition} RETURNING snapshot"  # noqa: S608 (constants)
    rows = transaction.rows(statement, *values)
    return [row["snapshot"] for row in rows if row["snapshot"] is not None]


def insert_snapshot(transaction: Transaction, snapshot: SnapshotRecord, *, owner: str, held_by: str = "") -> bool:
    """Without its content; false if it is there."""
    inserted = transaction.run(
        "INSERT INTO snapshots (file, position, pending, last_token, turn, num_bytes, fingerprint, owner, held_by) "
        "VALUES (%s,%s,%s,%s,%s,%s,%s,%s,%s) ON CONFLICT DO NOTHING",
        *(snapshot.file, snapshot.position, json.dumps(snapshot.pending), snapshot.last_token),
        *(str(snapshot.turn), snapshot.num_bytes, snapshot.fingerprint, owner, held_by),
    )
    return inserted > 0


def require_snapshot(transaction: Transaction, snapshot: SnapshotRecord) -> None:
    """Raises `NotFoundError`."""
    if transaction.row("SELECT 1 FROM snapshots WHERE file = %s", snapshot.file) is None:
        raise snapshot_gone()


def files_among(transaction: Transaction, files: Collection[str]) -> set[str]:
    """Those of the files that there are snapshots of."""
    rows = transaction.rows(f"SELECT file FROM snapshots WHERE file {AMONG}", json.dumps([*files]))  # noqa: S608
    return {row["file"] for row in rows}


def unreferenced(transaction: Transaction, files: Collection[str]) -> list[str]:
    """Those of the snapshots that nothing refers to and nobody uses."""
    statement = f"SELECT file FROM snapshots AS n WHERE file {AMONG} AND {UNREFERENCED}"  # noqa: S608 (constants)
    return [row["file"] for row in transaction.rows(statement, json.dumps([*files]))]


def delete_unreferenced(transaction: Transaction, files: Collection[str]) -> None:
    """Removes those of the snapshots that nothing refers to and nobody uses, with what there is of them here."""
    statement = f"DELETE FROM snapshots AS n WHERE file {AMONG} AND {UNREFERENCED}"  # noqa: S608 (constants)
    transaction.run(statement, json.dumps([*files]))


def _states(transaction: Transaction, rows: Sequence[Row]) -> list[StateRecord]:
    points: dict[str, list[PointRecord]] = {row["id"]: [] for row in rows}
    for row in transaction.rows(f"{_POINTS} WHERE state {AMONG} ORDER BY created, name", json.dumps([*points])):
        points[row["state"]].append(PointRecord(row["name"], row["created"], _snapshot(row)))
    return [
        StateRecord(
            **{key: row[key] for key in ("id", "owner", "name", "parent", "created", "used", "ttl_s", "number")},
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
        fingerprint=row["made_by"],
    )


def _snapshot(row: Row) -> SnapshotRecord:
    return SnapshotRecord(
        **{key: row[key] for key in ("file", "position", "last_token", "num_bytes", "fingerprint", "held_by")},
        pending=tuple(json.loads(row["pending"])),
        turn=TurnEnd(row["turn"]),
    )


def _is_text(value: str) -> bool:
    """Whether it can be in the index at all: PostgreSQL has neither NUL nor halves of surrogate pairs."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
