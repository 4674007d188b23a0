"""The index in an SQLite file: one connection, for one thread at a time."""

import logging
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from server.states.errors import DiskFullError, StoreUnavailableError
from server.states.index.database import Row, Transaction
from server.states.index.schema import SQLITE_MIGRATIONS, SQLITE_TABLES

_PRAGMAS = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON")
_UNUSABLE = {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_READONLY,
}
_log = logging.getLogger(__name__)


class SqliteTransaction(Transaction):
    """See `Transaction`."""

    def __init__(self, connection: sqlite3.Connection, now: float) -> None:
        super().__init__(now)
        self._connection = connection

    def rows(self, statement: str, *values: object) -> list[Row]:
        """See `Transaction.rows`."""
        return self._connection.execute(_translated(statement), values).fetchall()

    def run(self, statement: str, *values: object) -> int:
        """See `Transaction.run`."""
        return self._connection.execute(_translated(statement), values).rowcount


class Sqlite:
    """A `Database` in a file."""

    tables: Collection[str] = SQLITE_TABLES

    def __init__(self, path: Path, *, clock: Callable[[], float]) -> None:
        """Opens or makes the file; raises `sqlite3.DatabaseError` if it is damaged, or no database."""
        self._clock = clock
        self._guard = threading.Lock()
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        for pragma in _PRAGMAS:
            self._connection.execute(f"PRAGMA {pragma}")
        if (problem := self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            self._connection.close()
            raise sqlite3.DatabaseError(" ".join(problem.split()))

    def close(self) -> None:
        """See `Database.close`."""
        self._connection.close()

    def migration(self, version: int) -> Collection[str]:
        """See `Database.migration`."""
        return SQLITE_MIGRATIONS[version]

    def version(self, transaction: Transaction) -> int | None:
        """See `Database.version`."""
        names = {row["name"] for row in transaction.rows("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "version" in names:
            return transaction.number("SELECT number FROM version")
        return 1 if "states" in names else None

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """See `Database.reading`."""
        with self._transaction("BEGIN") as transaction:
            yield transaction

    @contextmanager
    def changing(self, *, is_long: bool = False) -> Iterator[Transaction]:
        """See `Database.changing`; raises `StorageFullError` if the disk is full."""
        with self._transaction("BEGIN IMMEDIATE") as transaction:
            yield transaction

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[Transaction]:
        with self._guard:
            try:
                self._connection.execute(begin)
                try:
                    yield SqliteTransaction(self._connection, self._clock())
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.DatabaseError as error:
                code = error.sqlite_errorcode & 0xFF
                if code == sqlite3.SQLITE_FULL:
                    raise DiskFullError from error
                if code in _UNUSABLE:
                    _log.error("the index of states cannot be used: %s", error)
                    raise StoreUnavailableError from error
                raise


def _translated(statement: str) -> str:
    return statement.replace("json_array_elements_text(%s::json)", "json_each(%s)").replace("%s", "?")
