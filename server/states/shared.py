"""The store that servers share: index and files are in PostgreSQL, with working copies of some files here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psycopg

from server.states.clock import ClockWatch, seconds_since_boot
from server.states.errors import StoreError, StoreUnavailableError
from server.states.files.contents import SharedFiles
from server.states.index.index import StateIndex
from server.states.index.postgres import Postgres
from server.states.indexed import IndexedStore, StoreOptions

LEASE_S = 20.0


@dataclass(frozen=True, slots=True)
class SharedOptions:
    """How a store is shared.

    Attributes:
        url: `postgresql://...`.
        schema: of the tables; the same for all servers of a model.
        max_copies_bytes: of working copies that nobody uses just now.
        max_connections: to the database, of this server.
        timeout_s: for a connection, and for the answer to a statement.
        bytes_url: `s3://bucket/prefix` for the content of files; None: it is in the database.
        replica_name: of this server.
        lease_s: after how long without a heartbeat a server is taken for dead.
    """

    url: str
    schema: str = "dijiang"
    max_copies_bytes: int = 1 << 30
    max_connections: int = 8
    timeout_s: float = 5.0
    bytes_url: str | None = None
    replica_name: str = ""
    lease_s: float = LEASE_S


def open_shared_store(
    folder: Path,
    shared: SharedOptions,
    options: StoreOptions,
    *,
    clock: Callable[[], float] | None = None,
    monotonic: Callable[[], float] = seconds_since_boot,
) -> IndexedStore:
    """Opens or makes a store.

    Args:
        folder: for working copies; servers on this machine may share it.
        clock: seconds since 1970; None: the database's own.
        monotonic: seconds that nobody sets.

    Raises:
        StoreError: the database or the folder cannot be used.
    """
    try:
        database = Postgres(
            shared.url,
            schema=shared.schema,
            max_connections=shared.max_connections,
            timeout_s=shared.timeout_s,
            clock=clock,
        )
    except psycopg.Error as error:
        raise _opening_failed(error) from error
    files = _open_files(folder, shared, database)
    try:
        index = StateIndex(
            database,
            replica=files.replica,
            budget=options.budget,
            lease_s=shared.lease_s,
            watch=ClockWatch(monotonic),
        )
        return IndexedStore(index, files, options, is_shared=True, num_threads=shared.max_connections)
    except (psycopg.Error, StoreUnavailableError, StoreError) as error:
        files.close()
        database.close()
        if isinstance(error, psycopg.errors.InsufficientPrivilege):
            message = f"the tables of states cannot be made in the schema {shared.schema}: {error}"
            raise StoreError(message) from error
        raise _opening_failed(error) from error


def _open_files(folder: Path, shared: SharedOptions, database: Postgres) -> SharedFiles:
    """Raises `StoreError`: the folder, or the bucket, cannot be used."""
    copies, name = shared.max_copies_bytes, shared.replica_name
    if shared.bytes_url is None:
        return SharedFiles(folder, max_bytes=copies, database=database, replica_name=name)
    try:
        from server.states.files.bucket import Bucket
        from server.states.files.objects import ObjectFiles
    except ImportError as error:
        raise StoreError(f"state_store_bytes needs boto3: pip install 'dijiang[s3]' ({error})") from error
    bucket = Bucket(shared.bytes_url, timeout_s=shared.timeout_s, max_connections=shared.max_connections)
    return ObjectFiles(folder, max_bytes=copies, database=database, replica_name=name, bucket=bucket)


def _opening_failed(error: Exception) -> StoreError:
    """A sentence that names no password."""
    if isinstance(error, StoreError):
        return error
    cause = error.__cause__ if isinstance(error, StoreUnavailableError) and error.__cause__ is not None else error
    return StoreError(f"the store of states cannot be used: {str(cause).strip()}")
