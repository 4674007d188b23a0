"""Connections to PostgreSQL: made when they are needed, kept for the next transaction, thrown away when they break.

Used by several threads at once. A transaction either commits or leaves nothing. A server that does not answer is a
`StoreUnavailableError`, and nothing of the past as soon as it is back.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import Connection, Cursor, errors, sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import DictRow, dict_row

from server.states.errors import StoreUnavailableError

_DEFAULTS = {
    "application_name": "dijiang",
    "connect_timeout": "5",
    "tcp_user_timeout": "15000",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
}
"""Of libpq, where the address says nothing else: a server that has vanished is noticed within seconds."""
_LIMITS = "SET LOCAL lock_timeout = '20s'; SET LOCAL idle_in_transaction_session_timeout = '60s'"
_SLOW_S, _RETRY_S = 1.0, 2.0
"""After a try to connect that took so long, for how long nobody else waits for another one."""
_UNAVAILABLE = (psycopg.OperationalError, psycopg.InterfaceError, errors.ReadOnlySqlTransaction)
_log = logging.getLogger(__name__)
Row = DictRow


@dataclass(frozen=True, slots=True)
class Transaction:
    """An open transaction.

    Attributes:
        cursor: its statements; rows are dictionaries.
        now: seconds since 1970, by the server's clock, which all replicas share.
    """

    cursor: Cursor[Row]
    now: float

    def rows(self, statement: str, *values: object) -> list[Row]:
        """All rows of a statement."""
        return self.cursor.execute(statement.encode(), values).fetchall()

    def row(self, statement: str, *values: object) -> Row | None:
        """The first row of a statement."""
        return self.cursor.execute(statement.encode(), values).fetchone()

    def number(self, statement: str, *values: object) -> int:
        """The one integer that a statement gives."""
        row = self.row(statement, *values)
        assert row is not None
        (value,) = row.values()
        return int(value)

    def run(self, statement: str, *values: object) -> int:
        """How many rows a statement without a result has changed."""
        return self.cursor.execute(statement.encode(), values).rowcount


class Postgres:
    """See the module."""

    def __init__(self, url: str, *, schema: str, clock: Callable[[], float] | None = None) -> None:
        """Connects nowhere yet.

        Args:
            url: `postgresql://...`, as libpq takes it; what it leaves out may be in `PG...` variables.
            schema: of all tables.
            clock: None: the server's.

        Raises:
            psycopg.ProgrammingError: this is no such address.
        """
        given = conninfo_to_dict(url)
        self._parameters: dict[str, Any] = {**_DEFAULTS, **given, "client_encoding": "utf8"}
        self._clock = clock
        self._schema = sql.Identifier(schema)
        self._idle: list[Connection[Row]] = []
        self._guard = threading.Lock()
        self._down_until = 0.0
        self._was_up = True
        self._is_closed = False

    def close(self) -> None:
        """Closes what is not in use; what is, as soon as it is not."""
        with self._guard:
            self._is_closed = True
        self._drop_idle()

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """Sees everything as of one moment, changes nothing, and holds up nobody."""
        with self._transaction("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", timeout_s=120) as transaction:
            yield transaction

    @contextmanager
    def adding(self) -> Iterator[Transaction]:
        """Adds rows that nobody else knows of yet."""
        with self._transaction("BEGIN", timeout_s=120) as transaction:
            yield transaction

    @contextmanager
    def changing(self) -> Iterator[Transaction]:
        """Changes things, one replica after the other; to be short."""
        schema = sql.Literal(self._schema.as_string())
        lock = sql.SQL("SELECT pg_advisory_xact_lock(hashtextextended('dijiang states ' || {}, 0))").format(schema)
        with self._transaction("BEGIN", lock.as_string(), timeout_s=30) as transaction:
            yield transaction

    @contextmanager
    def _transaction(self, *begin: str, timeout_s: int) -> Iterator[Transaction]:
        path = sql.SQL("SET LOCAL search_path TO {}").format(self._schema).as_string()
        limit = f"SET LOCAL statement_timeout = '{timeout_s}s'"
        statements = (begin[0], path, _LIMITS, limit, *begin[1:], "SELECT extract(epoch FROM clock_timestamp()) AS now")
        try:
            connection, now = self._begun("; ".join(statements))
            try:
                with connection.cursor() as cursor:
                    yield Transaction(cursor, now if self._clock is None else self._clock())
                connection.execute("COMMIT")
            except BaseException:
                self._undo(connection)
                raise
        except _UNAVAILABLE as error:
            raise self._unavailable(error) from error
        self._give_back(connection)

    def _begun(self, statements: str) -> tuple[Connection[Row], float]:
        """A connection with an open transaction, and the time."""
        while (connection := self._taken()) is not None:
            try:
                return connection, _begin(connection, statements)
            except _UNAVAILABLE:
                # Nothing was done yet: it broke while nobody used it, as the others then did.
                connection.close()
                self._drop_idle()
        connection = self._connect()
        try:
            return connection, _begin(connection, statements)
        except BaseException:
            connection.close()
            raise

    def _taken(self) -> Connection[Row] | None:
        with self._guard:
            return self._idle.pop() if self._idle else None

    def _connect(self) -> Connection[Row]:
        if time.monotonic() < self._down_until:
            raise psycopg.OperationalError("the server did not answer a moment ago")
        begin = time.monotonic()
        try:
            connection = psycopg.connect(
                "", autocommit=True, prepare_threshold=None, row_factory=dict_row, **self._parameters
            )
        except psycopg.OperationalError:
            if time.monotonic() - begin > _SLOW_S:
                self._down_until = time.monotonic() + _RETRY_S
            raise
        if not self._was_up:
            _log.info("the store of states answers again")
        self._was_up = True
        return connection

    def _unavailable(self, error: psycopg.Error) -> StoreUnavailableError:
        self._drop_idle()
        if self._was_up:
            self._was_up = False
            _log.error("the store of states does not answer: %s", str(error).strip())
        return StoreUnavailableError()

    def _undo(self, connection: Connection[Row]) -> None:
        """Rolls back and keeps the connection; closes it if that cannot be."""
        with suppress(psycopg.Error):
            connection.execute("ROLLBACK")
            self._give_back(connection)
            return
        connection.close()

    def _give_back(self, connection: Connection[Row]) -> None:
        with self._guard:
            if not self._is_closed:
                self._idle.append(connection)
                return
        connection.close()

    def _drop_idle(self) -> None:
        with self._guard:
            dropped, self._idle = self._idle, []
        for connection in dropped:
            connection.close()


def _begin(connection: Connection[Row], statements: str) -> float:
    cursor = connection.execute(statements.encode())
    while cursor.nextset():
        pass
    row = cursor.fetchone()
    assert row is not None
    return float(row["now"])
