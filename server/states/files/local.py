"""The files of an embedded store: one folder, of one server."""

import fcntl
import logging
import os
import secrets
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from dijiang_model.program import program
from server.states.errors import StoreError
from server.states.files.disk import require_disk
from server.states.store import SnapshotRecord

FILES_FOLDER, INDEX_FILE, LOCK_FILE, SPARE_FILE = "files", "states.db", "lock", "spare"
SPARE_BYTES = 1 << 20
"""On a full disk, so much is there for deleting."""
_log = logging.getLogger(__name__)


class LocalFiles:
    """`SnapshotFiles` that are here and nowhere else.

    Attributes:
        folder: where they are.
        replica: an id for this server's run.
    """

    left_behind = None
    unused: Collection[str] = ()

    def __init__(self, home: Path) -> None:
        """Takes a folder, which is made if it is not there, for this user only.

        Raises:
            StoreError: another server uses it.
            OSError: it cannot be written.
        """
        self.folder = home / FILES_FOLDER
        self.replica = secrets.token_hex(16)
        self._held: Counter[str] = Counter()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _lock(home)
        self._spare = home / SPARE_FILE
        self._keep_spare_space()

    @property
    def held(self) -> list[str]:
        """See `SnapshotHome.held`."""
        return [*self._held]

    def path(self, file: str) -> Path:
        """See `SnapshotFiles.path`."""
        return self.folder / file

    def has(self, file: str) -> bool:
        """See `SnapshotFiles.has`: whatever is kept is here."""
        return True

    def hold(self, file: str) -> None:
        """See `SnapshotFiles.hold`."""
        self._held[file] += 1

    def release(self, file: str) -> None:
        """See `SnapshotFiles.release`."""
        self._held[file] -= 1
        if self._held[file] <= 0:
            del self._held[file]

    def add(self, file: str, num_bytes: int) -> None:
        """See `SnapshotFiles.add`: it stays for as long as the index says."""

    def drop(self, files: Collection[str]) -> None:
        """See `SnapshotFiles.drop`: there are no copies."""

    def upload(self, snapshot: SnapshotRecord, *, owner: str) -> None:
        """See `SnapshotFiles.upload`: it is where it is kept."""
        self.path(snapshot.file).stat()

    def tidy(self) -> None:
        """See `SnapshotFiles.tidy`: the index removes its files itself."""

    def download(self, snapshot: SnapshotRecord) -> None:
        """See `SnapshotFiles.download`."""

    def make_way(self, num_bytes: int) -> None:
        """See `SnapshotFiles.make_way`: what the index needs to delete and to end something is left over."""
        require_disk(self.folder, num_bytes + SPARE_BYTES)

    @contextmanager
    def spare_space(self) -> Iterator[None]:
        """See `SnapshotFiles.spare_space`."""
        self._spare.unlink(missing_ok=True)
        try:
            yield
        finally:
            self._keep_spare_space()

    def _keep_spare_space(self) -> None:
        """As much as there is, up to `SPARE_BYTES`; what is kept is not given up for more."""
        with suppress(OSError), self._spare.open("ab") as file:
            for halvings in range(5):
                with suppress(OSError):
                    os.posix_fallocate(file.fileno(), 0, SPARE_BYTES >> halvings)
                    return

    def remove(self, files: Collection[str]) -> None:
        """See `SnapshotHome.remove`."""
        for file in files:
            try:
                self.path(file).unlink(missing_ok=True)
            except OSError as error:
                _log.error("the file of a state that was deleted could not be removed: %s", error)

    def compare(self, snapshots: Mapping[str, int], unfinished: Collection[str]) -> None:
        """See `SnapshotHome.compare`."""
        found = {path.name: path.stat().st_size for path in self.folder.iterdir()}
        partial = [name for name in found if name.startswith(".") or (name in unfinished and name not in snapshots)]
        unknown = found.keys() - snapshots.keys() - {*partial}
        lost = [file for file, num_bytes in snapshots.items() if found.get(file) != num_bytes]
        if lost or unknown:
            raise StoreError(
                f"the index and the files in {self.folder.parent} do not belong together: {len(lost)} files are "
                f"missing or cut off, and {len(unknown)} are not in the index; nothing was removed. Restore both from "
                f"one backup, or run `{program()} state repair {self.folder.parent}`, which keeps what is whole"
            )
        self.remove(partial)

    def close(self) -> None:
        """See `SnapshotFiles.close`."""
        self._keep_spare_space()  # an index that is closed takes less
        os.close(self._lock)


def _lock(folder: Path) -> int:
    """Held for as long as this process lives."""
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StoreError(
            f"another server uses the states in {folder}; give this one a folder of its own (--states-folder)"
        ) from None
    return descriptor
