"""The index in PostgreSQL: a bounded pool of connections, and deadlines on this side of them.

Used by several threads at once. A transaction either commits or leaves nothing. A server that does not answer, or
hangs, is a `StoreUnavailableError` within seconds, and nothing of the past as soon as it is back.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self, TypeVar

import psycopg
from psycopg import Connection, Cursor, errors, sql
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg.rows import DictRow, dict_row
from psycopg_pool import ConnectionPool, PoolTimeout

from server.states.errors import DiskFullError, StoreUnavailableError
from server.states.index.database import Row, Transaction
from server.states.index.schema import POSTGRES_MIGRATIONS, POSTGRES_TABLES

_DEFAULTS = {
    "application_name": "dijiang",
    "tcp_user_timeout": "15000",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
}
"""Of libpq, where the address says nothing else: a server that has vanished is noticed within seconds."""
_SLICE_S, _SLOW_S, _RETRY_S = 0.25, 1.0, 2.0
"""How often somebody who waits for a connection looks whether there can be one; after a failure that took so long, for
how long nobody else waits for another one."""
LONG_S, IDLE_LIMIT = 120.0, "idle_in_transaction_session_timeout"
_UNAVAILABLE = (psycopg.OperationalError, psycopg.InterfaceError, errors.ReadOnlySqlTransaction, PoolTimeout)
_log = logging.getLogger(__name__)
# What the pool tells is told here once, and not for each try.
logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
T = TypeVar("T")


class PostgresTransaction(Transaction):
    """See `Transaction`.

    Attributes:
        cursor: its statements; rows are dictionaries.
    """

    def __init__(self, cursor: Cursor[DictRow], now: float) -> None:
        super().__init__(now)
        self.cursor = cursor

    def rows(self, statement: str, *values: object) -> list[Row]:
        """See `Transaction.rows`."""
        return self.cursor.execute(statement.encode(), values).fetchall()

    def run(self, statement: str, *values: object) -> int:
        """See `Transaction.run`."""
        return self.cursor.execute(statement.encode(), values).rowcount


class BoundedConnection(Connection[DictRow]):
    """A connection that waits for its server no longer than it may, though the server hangs."""

    timeout_s = 5.0
    was_used = False

    @classmethod
    def connect(  # type: ignore[override]  # the pool gives keywords alone
        cls, conninfo: str = "", *, on_failure: Callable[[psycopg.Error], None], **parameters: Any
    ) -> Self:
        """Raises `psycopg.OperationalError`, and tells it to `on_failure`."""
        try:
            return super().connect(conninfo, **parameters)
        except psycopg.OperationalError as error:
            on_failure(error)
            raise

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """See `psycopg.Connection.wait`."""
        return super().wait(gen, interval, self.timeout_s if timeout is None else timeout)


class Postgres:
    """A `Database`; see the module."""

    tables: Collection[str] = POSTGRES_TABLES

    def __init__(
        self,
        url: str,
        *,
        schema: str,
        max_connections: int,
        timeout_s: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Connects nowhere yet.

        Args:
            url: `postgresql://...`, as libpq takes it; what it leaves out may be in `PG...` variables.
            schema: of all tables.
            max_connections: open at once.
            timeout_s: for a connection, and for the answer to a statement.
            clock: None: the server's.

        Raises:
            psycopg.ProgrammingError: this is no such address.
        """
        parameters: dict[str, Any] = {
            **_DEFAULTS,
            "connect_timeout": str(max(2, round(timeout_s))),
            **conninfo_to_dict(url),
            "client_encoding": "utf8",
            "autocommit": True,
            "prepare_threshold": None,
            "row_factory": dict_row,
            "on_failure": self._note_failure,
        }
        self._clock = clock
        self._schema = schema
        self._timeout_s = timeout_s
        self._failure: tuple[float, psycopg.Error] | None = None
        self._down_until = 0.0
        self._was_up = True
        self._pool = ConnectionPool(
            "",
            connection_class=BoundedConnection,
            kwargs=parameters,
            min_size=0,
            max_size=max_connections,
            reconnect_timeout=0.0,
            num_workers=2,
            name="states",
            open=False,
        )
        self._opening = threading.Lock()

    def close(self) -> None:
        """Closes what is not in use; what is, as soon as it is not."""
        self._pool.close()

    def migration(self, version: int) -> Collection[str]:
        """See `Database.migration`."""
        return POSTGRES_MIGRATIONS[version]

    def version(self, transaction: Transaction) -> int | None:
        """See `Database.version`."""
        assert isinstance(transaction, PostgresTransaction)
        if transaction.row("SELECT 1 FROM pg_namespace WHERE nspname = %s", self._schema) is None:
            transaction.cursor.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(self._schema)))
        if transaction.row("SELECT 1 WHERE to_regclass('version') IS NOT NULL") is None:
            return None
        return transaction.number("SELECT number FROM version")

    @contextmanager
    def reading(self) -> Iterator[PostgresTransaction]:
        """See `Database.reading`."""
        with self._transaction("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY") as transaction:
            yield transaction

    @contextmanager
    def adding(self) -> Iterator[PostgresTransaction]:
        """Adds rows that nobody else knows of yet, in one statement of any length."""
        with self._transaction("BEGIN", statement_s=LONG_S) as transaction:
            yield transaction

    @contextmanager
    def changing(self, *, is_long: bool = False) -> Iterator[PostgresTransaction]:
        """See `Database.changing`."""
        schema = sql.Literal(sql.Identifier(self._schema).as_string())
        lock = sql.SQL("SELECT pg_advisory_xact_lock(hashtextextended('dijiang states ' || {}, 0))").format(schema)
        limit_s = LONG_S if is_long else None
        with self._transaction("BEGIN", lock.as_string(), statement_s=limit_s, wait_s=limit_s) as transaction:
            yield transaction

    @contextmanager
    def _transaction(
        self, *begin: str, statement_s: float | None = None, wait_s: float | None = None
    ) -> Iterator[PostgresTransaction]:
        """A transaction whose statements may take so long, and in which this side waits for so long without a sign."""
        statement_s = self._timeout_s if statement_s is None else statement_s
        wait_s = self._timeout_s if wait_s is None else wait_s
        path = sql.SQL("SET LOCAL search_path TO {}").format(sql.Identifier(self._schema)).as_string()
        # A lock that is not to be had ends on the server first: it is not mistaken for a server that hangs.
        limits = {"lock_timeout": 0.8 * wait_s, "statement_timeout": statement_s, IDLE_LIMIT: 60.0}
        limit = (f"SET LOCAL {name} = '{round(seconds * 1000)}ms'" for name, seconds in limits.items())
        statements = (begin[0], path, *limit, *begin[1:], "SELECT extract(epoch FROM clock_timestamp()) AS now")
        began = time.monotonic()
        try:
            connection, now = self._begun("; ".join(statements), wait_s)
            try:
                with connection.cursor() as cursor:
                    yield PostgresTransaction(cursor, now if self._clock is None else self._clock())
                connection.execute("COMMIT")
            except BaseException:
                _undo(connection)
                raise
            finally:
                self._pool.putconn(connection)
        except errors.DiskFull as error:
            raise DiskFullError from error
        except _UNAVAILABLE as error:
            raise self._unavailable(error, began) from error
        if not self._was_up:
            self._was_up = True
            _log.info("the store of states answers again")

    def _begun(self, statements: str, wait_s: float) -> tuple[BoundedConnection, float]:
        """A connection with an open transaction, and the time."""
        if time.monotonic() < self._down_until:
            raise psycopg.OperationalError("the server did not answer a moment ago")
        while True:
            connection = self._connected()
            is_new, connection.was_used, connection.timeout_s = not connection.was_used, True, wait_s
            try:
                return connection, _begin(connection, statements)
            except BaseException as error:
                hangs = connection.pgconn.transaction_status == TransactionStatus.ACTIVE
                connection.close()
                self._pool.putconn(connection)
                # What broke while nobody used it has done nothing yet: another one is tried.
                if is_new or hangs or not isinstance(error, _UNAVAILABLE):
                    raise

    def _connected(self) -> BoundedConnection:
        """A connection that nobody else uses."""
        with self._opening:
            self._pool.open()
        began = time.monotonic()
        while True:
            try:
                return self._pool.getconn(timeout=_SLICE_S)
            except PoolTimeout:
                failure = self._failure
                has_failed = failure is not None and failure[0] >= began
                if failure is not None and has_failed and not _is_crowded(failure[1]):
                    raise failure[1] from None
                if time.monotonic() - began > self._timeout_s:
                    raise

    def _note_failure(self, error: psycopg.Error) -> None:
        """Called on threads of the pool."""
        self._failure = time.monotonic(), error

    def _unavailable(self, error: psycopg.Error, began: float) -> StoreUnavailableError:
        if time.monotonic() - began > _SLOW_S:
            self._down_until = time.monotonic() + _RETRY_S
        if self._was_up:
            self._was_up = False
            _log.error("the store of states does not answer: %s", str(error).strip())
        return StoreUnavailableError()


def _begin(connection: BoundedConnection, statements: str) -> float:
    cursor = connection.execute(statements.encode())
    while cursor.nextset():
        pass
    row = cursor.fetchone()
    assert row is not None
    return float(row["now"])


def _undo(connection: BoundedConnection) -> None:
    """Rolls back; closes the connection if that cannot be."""
    if connection.pgconn.transaction_status != TransactionStatus.ACTIVE:
        with suppress(psycopg.Error):
            connection.execute("ROLLBACK")
            return
    connection.close()


def _is_crowded(error: psycopg.Error) -> bool:
    """Whether the server has all the connections that it may have: some end soon."""
    return isinstance(error, errors.TooManyConnections) or any(
        words in str(error) for words in ("too many clients", "too many connections", "remaining connection slots")
    )
