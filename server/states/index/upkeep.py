"""What keeps the index in order: room, expiry, eviction, and servers that are gone."""

import json
from collections.abc import Collection

from server.states.index.database import AMONG, Transaction
from server.states.index.rows import (
    DEAD,
    DEAD_RESPONSE,
    UNREFERENCED,
    delete_responses,
    delete_states,
    find_responses,
    write_response,
)

_WANTED_BYTES = (
    "SELECT (SELECT coalesce(sum(num_bytes), 0) FROM snapshots) + (SELECT coalesce(sum(num_bytes), 0) FROM uses "
    "WHERE NOT EXISTS (SELECT 1 FROM snapshots AS n WHERE n.file = uses.file)) AS number"
)
_OLDEST = (
    "SELECT kind, id FROM (SELECT 'states' AS kind, id, head AS file, used FROM states "  # noqa: S608 (constants)
    "UNION ALL SELECT 'responses', id, snapshot, used FROM responses WHERE snapshot IS NOT NULL) AS kept "
    f"WHERE NOT EXISTS (SELECT 1 FROM uses WHERE uses.file = kept.file) AND NOT file {AMONG} "
    "ORDER BY used LIMIT 1"
)


def wanted_bytes(transaction: Transaction) -> int:
    """Of all snapshots, and of the room that is kept for more."""
    return transaction.number(_WANTED_BYTES)


def totals(transaction: Transaction) -> tuple[int, int]:
    """How many states there are, and the bytes of all snapshots."""
    num_states = transaction.number("SELECT count(*) AS number FROM states")
    return num_states, transaction.number("SELECT coalesce(sum(num_bytes), 0) AS number FROM snapshots")


def other_replicas(transaction: Transaction, *, but: str) -> list[str]:
    """All servers that are known but one."""
    return [row["id"] for row in transaction.rows("SELECT id FROM replicas WHERE id <> %s", but)]


def silent_replicas(transaction: Transaction, beat: float) -> list[str]:
    """Those that were heard last before that time."""
    return [row["id"] for row in transaction.rows("SELECT id FROM replicas WHERE beat < %s", beat)]


def reap(transaction: Transaction, replicas: Collection[str]) -> None:
    """What they were making has failed, and what they used is free."""
    ids = json.dumps([*replicas])
    break_off(transaction, f"maker {AMONG}", ids)
    if transaction.run(f"DELETE FROM replicas WHERE id {AMONG}", ids):  # noqa: S608 (constants)
        rows = transaction.rows(f"SELECT file FROM snapshots AS n WHERE {UNREFERENCED}")  # noqa: S608 (constants)
        drop_unused(transaction, [row["file"] for row in rows])


def break_off(transaction: Transaction, condition: str, *values: object) -> None:
    """Responses of which a condition is true have failed, unless they have ended."""
    for response in find_responses(transaction, f"maker IS NOT NULL AND {condition}", *values):
        write_response(transaction, response.broken_off(), maker=None)


def drop_unused(transaction: Transaction, files: Collection[str]) -> None:
    """Those of the snapshots that nothing refers to and nobody uses are gone with the commit."""
    transaction.unreferenced.update(files)


def drop_expired(transaction: Transaction) -> None:
    """Deletes what was not used for its time to live."""
    files = delete_states(transaction, DEAD, transaction.now)
    drop_unused(transaction, [*files, *delete_responses(transaction, DEAD_RESPONSE, transaction.now)])


def drop_oldest(transaction: Transaction, held: Collection[str]) -> bool:
    """Deletes the state or response that was not used for longest; false if there is none but used ones."""
    row = transaction.row(_OLDEST, json.dumps([*held]))
    if row is None:
        return False
    delete = delete_states if row["kind"] == "states" else delete_responses
    drop_unused(transaction, delete(transaction, "id = %s", row["id"]))
    return True
