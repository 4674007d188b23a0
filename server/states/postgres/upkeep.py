"""What keeps the shared store in order: room, expiry, eviction, and replicas that are gone."""

from collections.abc import Collection

from server.states.postgres.connections import Transaction
from server.states.postgres.rows import (
    DEAD,
    DEAD_RESPONSE,
    delete_responses,
    delete_states,
    drop_unused,
    find_responses,
    write_response,
)

_WANTED_BYTES = (
    "SELECT (SELECT coalesce(sum(num_bytes), 0) FROM snapshots) + (SELECT coalesce(sum(num_bytes), 0) FROM uses u "
    "WHERE NOT EXISTS (SELECT 1 FROM snapshots n WHERE n.file = u.file))"
)
_OLDEST = (
    "SELECT kind, id FROM (SELECT 'states' AS kind, id, head AS file, used FROM states "
    "UNION ALL SELECT 'responses', id, snapshot, used FROM responses WHERE snapshot IS NOT NULL) AS kept "
    "WHERE NOT EXISTS (SELECT 1 FROM uses u WHERE u.file = kept.file) AND NOT file = ANY(%s) ORDER BY used LIMIT 1"
)


def wanted_bytes(transaction: Transaction) -> int:
    """Of all snapshots, and of the room that is kept for more."""
    return transaction.number(_WANTED_BYTES)


def totals(transaction: Transaction) -> tuple[int, int]:
    """How many states there are, and the bytes of all snapshots."""
    num_states = transaction.number("SELECT count(*) FROM states")
    return num_states, transaction.number("SELECT coalesce(sum(num_bytes), 0) FROM snapshots")


def dead_replicas(transaction: Transaction, beat: float) -> list[str]:
    """Those that were heard last before that time."""
    return [row["id"] for row in transaction.rows("SELECT id FROM replicas WHERE beat < %s", beat)]


def bury(transaction: Transaction, replicas: Collection[str]) -> None:
    """What they were making has failed, and what they used is free."""
    break_off(transaction, "maker = ANY(%s)", [*replicas])
    if transaction.run("DELETE FROM replicas WHERE id = ANY(%s)", [*replicas]):
        drop_unused(transaction, None)


def break_off(transaction: Transaction, condition: str, *values: object) -> None:
    """Responses of which a condition is true have failed, unless they have ended."""
    for response in find_responses(transaction, f"maker IS NOT NULL AND {condition}", *values):
        write_response(transaction, response.broken_off(), maker=None)


def drop_expired(transaction: Transaction) -> None:
    """Deletes what was not used for its time to live."""
    files = delete_states(transaction, DEAD, transaction.now)
    drop_unused(transaction, [*files, *delete_responses(transaction, DEAD_RESPONSE, transaction.now)])


def drop_oldest(transaction: Transaction, held: Collection[str]) -> bool:
    """Deletes the state or response that was not used for longest; false if there is none but used ones."""
    row = transaction.row(_OLDEST, [*held])
    if row is None:
        return False
    delete = delete_states if row["kind"] == "states" else delete_responses
    drop_unused(transaction, delete(transaction, "id = %s", row["id"]))
    return True
