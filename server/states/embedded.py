"""The default store: one folder with an SQLite index and one file per snapshot, for one server.

Crash-safe: a file is written whole before the index names it, and removed only after the index has forgotten it. What a
crash leaves between the two the index knows, and the next start removes it. An index that is missing, empty, damaged,
or does not belong to the files stops the start, and nothing is removed.
"""

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from dijiang_model.program import program
from server.states.clock import ClockWatch, seconds_since_boot
from server.states.errors import DiskFullError, StoreError, StoreUnavailableError
from server.states.files.disk import free_bytes
from server.states.files.local import INDEX_FILE, SPARE_BYTES, LocalFiles
from server.states.index.index import StateIndex
from server.states.index.sqlite import Sqlite
from server.states.indexed import IndexedStore, StoreOptions


def open_embedded_store(
    folder: Path,
    options: StoreOptions,
    *,
    clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = seconds_since_boot,
) -> IndexedStore:
    """Opens or makes a store.

    Args:
        folder: of this store alone; made if it is not there, for this user only.
        clock: seconds since 1970.
        monotonic: seconds that nobody sets.

    Raises:
        StoreError: another server uses it, it cannot be written, or its index cannot be used.
    """
    try:
        files = LocalFiles(folder)
    except OSError as error:
        raise StoreError(f"the folder of states {folder} cannot be used: {error}") from error
    try:
        _require_index(folder / INDEX_FILE, files.folder)
        with files.spare_space():  # a start on a full disk has its few writes, too
            database = Sqlite(folder / INDEX_FILE, clock=clock)
            watch = ClockWatch(monotonic)
            index = StateIndex(database, replica=files.replica, budget=options.budget, home=files, watch=watch)
            return IndexedStore(index, files, options, is_shared=False, num_threads=1)
    except (DiskFullError, OSError, sqlite3.Error, StoreUnavailableError) as error:
        files.close()
        if isinstance(error, DiskFullError) or (_is_io_error(error) and free_bytes(folder) < SPARE_BYTES):
            raise StoreError(
                f"the disk of the states in {folder} is full: {SPARE_BYTES:,} bytes are needed to start; nothing was "
                "removed"
            ) from error
        raise StoreError(
            f"the index of states {folder / INDEX_FILE} cannot be used: {error}; nothing was removed. Restore it with "
            f"its files from a backup, or run `{program()} state repair {folder}`, which keeps what is whole"
        ) from error
    except BaseException:
        files.close()
        raise


def _is_io_error(error: BaseException) -> bool:
    """Whether SQLite could not read or write; on a full disk it sometimes knows no more than that."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)  # missing where we have raised it ourselves
    return isinstance(code, int) and code & 0xFF == sqlite3.SQLITE_IOERR


def _require_index(path: Path, files: Path) -> None:
    """Raises `StoreError` where files have lost their index."""
    if (not path.exists() or path.stat().st_size == 0) and any(files.iterdir()):
        raise StoreError(
            f"{files} has files of states, and their index {path} is missing or empty; nothing was removed. Restore it "
            f"from a backup, or run `{program()} state repair {path.parent}`, which makes an empty one and keeps "
            "the files"
        )
