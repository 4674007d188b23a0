"""What keeps the index in order: room, expiry, eviction, and servers that are gone."""

import json
from collections.abc import Collection
from dataclasses import dataclass

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

RECORD_BYTES = 512
"""What a row costs beside what is in it: a state, a point, a response, room that is kept."""
NOBODY = ""
"""The maker of a response that waits: whoever takes it up."""
MAX_CLAIMS = 3
"""After so many servers that were gone before it was complete, a response has failed: it may have been their end."""
_WANTED_BYTES = (
    "SELECT (SELECT coalesce(sum(num_bytes), 0) FROM snapshots {of_owner}) "  # noqa: S608 (constants)
    f"+ (SELECT coalesce(sum(text_bytes + {RECORD_BYTES}), 0) FROM responses {{of_owner}}) "
    f"+ (SELECT {RECORD_BYTES} * count(*) FROM states {{of_owner}}) "
    f"+ (SELECT {RECORD_BYTES} * count(*) FROM points {{of_state}}) "
    f"+ (SELECT coalesce(sum(num_bytes + {RECORD_BYTES}), 0) FROM uses {{of_owner}} "
    "{and_where} num_bytes > 0 AND NOT EXISTS (SELECT 1 FROM snapshots AS n WHERE n.file = uses.file)) AS number"
)
_ALL_BYTES = _WANTED_BYTES.format(of_owner="", of_state="", and_where="WHERE")
_OWNER_BYTES = _WANTED_BYTES.format(
    of_owner="WHERE owner = %s",
    of_state="WHERE state IN (SELECT id FROM states WHERE owner = %s)",
    and_where="AND",
)
_OLDEST = (
    "SELECT kind, id FROM (SELECT 'states' AS kind, id, head AS file, used, owner FROM states "  # noqa: S608
    "UNION ALL SELECT 'responses', id, snapshot, used, owner FROM responses WHERE maker IS NULL) AS kept "
    "WHERE owner = %s AND id <> %s AND (file IS NULL OR "
    f"(NOT EXISTS (SELECT 1 FROM uses WHERE uses.file = kept.file) AND NOT file {AMONG})) ORDER BY used LIMIT 1"
)


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of all that is kept: files, texts of responses, and the rows that name them.

    Attributes:
        max_bytes: of all owners.
        max_owner_bytes: of each owner.
        can_evict: whether what an owner has not used for longest makes room for what is new of the same owner.
    """

    max_bytes: int
    max_owner_bytes: int
    can_evict: bool = True


def wanted_bytes(transaction: Transaction, owner: str | None) -> int:
    """Of all that an owner keeps (None: that all keep), and of the room that is kept for more."""
    if owner is None:
        return transaction.number(_ALL_BYTES)
    return transaction.number(_OWNER_BYTES, *[owner] * _OWNER_BYTES.count("%s"))


def totals(transaction: Transaction) -> tuple[int, int]:
    """How many states there are, and the bytes of all that is kept."""
    return transaction.number("SELECT count(*) AS number FROM states"), wanted_bytes(transaction, None)


def other_replicas(transaction: Transaction, *, but: str) -> list[str]:
    """All servers that are known but one."""
    return [row["id"] for row in transaction.rows("SELECT id FROM replicas WHERE id <> %s", but)]


def silent_replicas(transaction: Transaction, beat: float) -> list[str]:
    """Those that were heard last before that time."""
    return [row["id"] for row in transaction.rows("SELECT id FROM replicas WHERE beat < %s", beat)]


def reap(transaction: Transaction, replicas: Collection[str]) -> None:
    """What they were making waits for another server, or has failed if it cannot; what they used is free."""
    ids = json.dumps([*replicas])
    waiting = f"maker {AMONG} AND claims < {MAX_CLAIMS}"
    for response in find_responses(transaction, waiting, ids):
        if response.can_go_on:
            write_response(transaction, response.suspended(), maker=NOBODY)
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


def newest_use(transaction: Transaction) -> float | None:
    """When the store was used last, by its own times; None: never."""
    statement = (
        "SELECT max(used) AS newest FROM (SELECT used FROM states UNION ALL SELECT used FROM responses "
        "UNION ALL SELECT beat FROM replicas) AS times"
    )
    row = transaction.row(statement)
    return None if row is None or row["newest"] is None else float(row["newest"])


def follow_step(transaction: Transaction, step_s: float) -> None:
    """The clock was set: time that nobody lived through is not time without use, and no use is in the future."""
    for table in ("states", "responses"):
        if step_s > 0:
            transaction.run(f"UPDATE {table} SET used = used + %s", step_s)  # noqa: S608 (constants)
        now = transaction.now
        transaction.run(f"UPDATE {table} SET used = %s WHERE used > %s", now, now)  # noqa: S608 (constants)


def drop_expired(transaction: Transaction) -> None:
    """Deletes what was not used for its time to live."""
    files = delete_states(transaction, DEAD, transaction.horizon)
    drop_unused(transaction, [*files, *delete_responses(transaction, DEAD_RESPONSE, transaction.horizon)])


def drop_oldest(transaction: Transaction, owner: str, held: Collection[str], keep: str) -> bool:
    """Deletes what the owner has not used for longest, but not `keep`; false if there is none but used ones."""
    row = transaction.row(_OLDEST, owner, keep, json.dumps([*held]))
    if row is None:
        return False
    delete = delete_states if row["kind"] == "states" else delete_responses
    drop_unused(transaction, delete(transaction, "id = %s", row["id"]))
    return True
