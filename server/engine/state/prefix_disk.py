"""The prefix cache's last tier: snapshots in files of this engine alone, gone with it.

Nothing here needs to survive: the folder is emptied at start, and nothing is flushed to the disk. A file that does not
come back as it was written is a miss, never a wrong state.
"""

import hashlib
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from server.engine.state.snapshot_files import Bytes

_SUFFIX = ".prefix"
_log = logging.getLogger(__name__)


class RowAccess(Protocol):
    """Snapshots as bytes and back; see `server.engine.state.snapshots.SlotAccess`."""

    def to_row(self, snapshot: object) -> Bytes: ...
    def from_row(self, row: Bytes) -> object: ...


class PrefixDisk:
    """Writes and reads snapshots on a thread of its own."""

    def __init__(self, access: RowAccess, folder: Path) -> None:
        """Makes the folder, and empties it of what an earlier engine has left.

        Raises:
            OSError: it cannot be written.
        """
        self._access = access
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefix-disk")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in folder.glob(f"*{_SUFFIX}"):
            path.unlink()

    def write(self, number: int, snapshot: object) -> "Future[bytes]":
        """Writes a snapshot that is on the host; gives the digest that `read` asks for."""
        return self._thread.submit(self._write, number, snapshot)

    def read(self, number: int, digest: bytes) -> "Future[object]":
        """Reads one back; fails with `OSError` or `ValueError` if it is not there as it was."""
        return self._thread.submit(self._read, number, digest)

    def remove(self, number: int) -> None:
        """Removes one, after what was begun with it."""
        self._thread.submit(self._path(number).unlink, missing_ok=True)

    def wait(self) -> None:
        """Returns when all that was begun is done."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _write(self, number: int, snapshot: object) -> bytes:
        row = self._access.to_row(snapshot)
        try:
            self._path(number).write_bytes(row.data)
        except OSError as error:
            _log.warning("a cached prefix could not be written: %s", error.strerror)
            raise
        return hashlib.blake2b(row.data).digest()

    def _read(self, number: int, digest: bytes) -> object:
        content = self._path(number).read_bytes()
        if hashlib.blake2b(content).digest() != digest:
            raise ValueError("a cached prefix has changed on the disk")
        return self._access.from_row(np.frombuffer(bytearray(content), dtype=np.uint8))

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}{_SUFFIX}"
