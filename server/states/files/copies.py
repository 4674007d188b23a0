"""One server's working copies of the files of a shared store, and who it is.

Every server has a folder of its own among those of the servers of this machine, the first that is free. It notes its id
there: the next one that takes the folder knows for sure that the one before is gone. Copies are emptied at every start.
"""

import fcntl
import itertools
import os
import secrets
from collections import Counter
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from server.states.errors import StoreError
from server.states.files.disk import free_bytes, require_disk

FILES_FOLDER, LOCK_FILE, ID_FILE = "files", "lock", "id"


class WorkingCopies:
    """See the module. Used on one thread.

    Attributes:
        folder: where the files are.
        replica: this server's id.
        left_behind: ids of servers that were here and are gone.
    """

    def __init__(self, parent: Path, *, max_bytes: int) -> None:
        """Takes a folder.

        Args:
            parent: of the folders of this machine's servers; made if it is not there, for this user only.
            max_bytes: of copies that nobody uses just now.

        Raises:
            StoreError: it cannot be written.
        """
        self._max_bytes = max_bytes
        self._held: Counter[str] = Counter()
        self._sizes: dict[str, int] = {}
        self.replica = secrets.token_hex(16)
        try:
            home, self._lock, self.left_behind = _claim(parent)
            self.folder = home / FILES_FOLDER
            self.folder.mkdir(exist_ok=True, mode=0o700)
            for path in self.folder.iterdir():
                path.unlink()
            (home / ID_FILE).write_text(self.replica)
        except OSError as error:
            raise StoreError(f"the folder of copies of states {parent} cannot be used: {error}") from error

    @property
    def held(self) -> list[str]:
        """Files that are held."""
        return [*self._held]

    @property
    def unused(self) -> list[str]:
        """Files that are here, and not held."""
        return [file for file in [*self._sizes] if file not in self._held]

    def path(self, file: str) -> Path:
        """Where a copy is, or is to be."""
        return self.folder / file

    def has(self, file: str) -> bool:
        """Whether a copy is here, whole; counts as use."""
        if file not in self._sizes:
            return False
        self._sizes[file] = self._sizes.pop(file)
        return True

    def hold(self, file: str) -> None:
        """Keeps a file, which may not be here yet, until it is released as often as it was held."""
        self._held[file] += 1

    def release(self, file: str) -> None:
        """See `hold`; a file that was not added is removed."""
        self._held[file] -= 1
        if self._held[file] > 0:
            return
        del self._held[file]
        if file not in self._sizes:
            self.path(file).unlink(missing_ok=True)
        self._make_room()

    def add(self, file: str, num_bytes: int) -> None:
        """A file that is whole may stay for as long as there is room."""
        self._sizes[file] = num_bytes
        self._make_room()

    def drop(self, files: Collection[str]) -> None:
        """Removes copies, except those that are held."""
        for file in files:
            if file not in self._held and self._sizes.pop(file, None) is not None:
                self.path(file).unlink(missing_ok=True)

    def make_way(self, num_bytes: int) -> None:
        """See `SnapshotFiles.make_way`: copies that nobody uses go first."""
        for file in self.unused:
            if free_bytes(self.folder) >= num_bytes:
                return
            self.drop([file])
        require_disk(self.folder, num_bytes)

    def tidy(self) -> None:
        """See `SnapshotFiles.tidy`: content goes with its row."""

    def spare_space(self) -> AbstractContextManager[None]:
        """See `SnapshotFiles.spare_space`: the index is elsewhere."""
        return nullcontext()

    def close(self) -> None:
        """Empties and frees the folder."""
        self._held.clear()
        self.drop([*self._sizes])
        os.close(self._lock)

    def _make_room(self) -> None:
        excess = sum(self._sizes.values()) - self._max_bytes
        for file in self.unused:
            if excess <= 0:
                return
            excess -= self._sizes[file]
            self.drop([file])


def _claim(parent: Path) -> tuple[Path, int, tuple[str, ...]]:
    """The first free folder, its lock, and the ids in all that are free."""
    claimed: tuple[Path, int] | None = None
    found: list[str] = []
    for number in itertools.count():
        home = parent / f"replica-{number}"
        if claimed is not None and not home.exists():
            return *claimed, tuple(found)
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(home / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        if (home / ID_FILE).exists():
            found.append((home / ID_FILE).read_text())
        if claimed is None:
            claimed = home, lock
        else:
            os.close(lock)
    raise AssertionError("unreachable")
