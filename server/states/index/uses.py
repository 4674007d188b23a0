"""Which servers there are, and what each of them uses just now."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from server.states.index.database import AMONG, Transaction


@dataclass(frozen=True, slots=True)
class Use:
    """How a file is used: bytes that are kept free for it, and whose budget pays for them."""

    num_bytes: int = 0
    owner: str = ""


READING = Use()


@dataclass(frozen=True, slots=True)
class InUse:
    """What this server uses just now.

    Attributes:
        files: those that it writes or reads.
        making: responses that are being made here.
        stored: those of them that are in the index since.
        copies: files that are here and not used.
    """

    files: Mapping[str, Use]
    making: Collection[str]
    stored: Collection[str]
    copies: Collection[str]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a server learns when it is heard.

    Attributes:
        gone_responses: which it makes, and which were cancelled or deleted elsewhere.
        gone_copies: files that the store has no more.
    """

    gone_responses: tuple[str, ...]
    gone_copies: tuple[str, ...]


def use_of(record_id: str) -> str:
    """What stands for a state or response among the files in `uses` while somebody goes on from it."""
    return f"use of {record_id}"


def register(transaction: Transaction, replica: str, *, heartbeats: bool) -> None:
    """Notes that a server lives; without heartbeats, that it is there."""
    if not heartbeats and transaction.row("SELECT 1 FROM replicas WHERE id = %s", replica) is not None:
        return
    transaction.run(
        "INSERT INTO replicas (id, beat) VALUES (%s,%s) ON CONFLICT (id) DO UPDATE SET beat = excluded.beat",
        *(replica, transaction.now),
    )


def note_use(transaction: Transaction, replica: str, file: str, use: Use = READING) -> None:
    """A server reads a file, or writes one for which room is kept; a heartbeat may have noted it already."""
    transaction.run(
        "INSERT INTO uses (file, replica, num_bytes, owner) VALUES (%s,%s,%s,%s) "
        "ON CONFLICT (file, replica) DO UPDATE SET num_bytes = excluded.num_bytes, owner = excluded.owner",
        *(file, replica, use.num_bytes, use.owner),
    )


def files_with_room(transaction: Transaction, replica: str) -> set[str]:
    """The files that a server writes, for which room is kept."""
    rows = transaction.rows("SELECT file FROM uses WHERE replica = %s AND num_bytes > 0", replica)
    return {row["file"] for row in rows}


def end_uses(transaction: Transaction, replica: str, files: Collection[str]) -> None:
    """A server uses the files no more."""
    if files:
        statement = f"DELETE FROM uses WHERE replica = %s AND file {AMONG}"  # noqa: S608 (constants)
        transaction.run(statement, replica, json.dumps([*files]))


def note_uses(transaction: Transaction, replica: str, files: Mapping[str, Use]) -> list[str]:
    """Writes down what a server uses; what it uses no more."""
    noted = {row["file"] for row in transaction.rows("SELECT file FROM uses WHERE replica = %s", replica)}
    for file in files.keys() - noted:
        note_use(transaction, replica, file, files[file])
    ended = [*(noted - files.keys())]
    end_uses(transaction, replica, ended)
    return ended
