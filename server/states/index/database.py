"""What the index asks of a database: transactions that commit wholly or leave nothing, in one SQL.

Statements are written for PostgreSQL and kept to what SQLite knows too; `server.states.index.sqlite` translates the
rest, placeholders and `AMONG`.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any, Protocol

Row = Any
"""A result's row, by the names of its columns."""
AMONG = "IN (SELECT value FROM json_array_elements_text(%s::json))"
"""After a column: it is one of the texts in a JSON array."""


class Transaction(ABC):
    """An open transaction.

    Attributes:
        now: seconds since 1970, by the database's clock.
        horizon: what has lived its time by then has expired.
        unreferenced: snapshots that this transaction may have left without a reference.
        retired: those that were dropped, whose files are to be removed after the commit.
    """

    def __init__(self, now: float) -> None:
        self.now = self.horizon = now
        self.unreferenced: set[str] = set()
        self.retired: list[str] = []

    @abstractmethod
    def rows(self, statement: str, *values: object) -> list[Row]:
        """All rows of a statement."""

    @abstractmethod
    def run(self, statement: str, *values: object) -> int:
        """How many rows a statement without a result has changed."""

    def row(self, statement: str, *values: object) -> Row | None:
        """The first row of a statement."""
        rows = self.rows(statement, *values)
        return rows[0] if rows else None

    def number(self, statement: str, *values: object) -> int:
        """The integer that a statement calls `number`."""
        (row,) = self.rows(statement, *values)
        return int(row["number"])


class Database(Protocol):
    """See the module. A database that cannot be reached raises `StoreUnavailableError`."""

    @property
    def tables(self) -> Collection[str]:
        """Statements that make the tables."""
        ...

    def migration(self, version: int) -> Collection[str]:
        """Statements that lead from the tables of a version to those of the next one."""
        ...

    def version(self, transaction: Transaction) -> int | None:
        """Of the tables that are there; None: there are none. Makes the place for them if need be."""
        ...

    def reading(self) -> AbstractContextManager[Transaction]:
        """Sees everything as of one moment, changes nothing, and holds up nobody."""
        ...

    def changing(self, *, is_long: bool = False) -> AbstractContextManager[Transaction]:
        """Changes things, one server after the other; to be short, unless it is said to be long."""
        ...

    def close(self) -> None:
        """May be called twice."""
        ...
