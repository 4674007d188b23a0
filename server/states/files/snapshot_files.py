"""What a store asks of the files of its snapshots."""

from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from server.states.store import SnapshotRecord


class SnapshotFiles(Protocol):
    """The files of snapshots, as far as they are on this machine. Used on the event loop, unless a method says so."""

    @property
    def folder(self) -> Path:
        """Where they are."""
        ...

    @property
    def replica(self) -> str:
        """This server's id."""
        ...

    @property
    def left_behind(self) -> Collection[str] | None:
        """Ids of servers that were here and are gone; None: all others are."""
        ...

    @property
    def held(self) -> list[str]:
        """Files that are held."""
        ...

    @property
    def unused(self) -> Collection[str]:
        """Copies that are here, and not held."""
        ...

    def path(self, file: str) -> Path:
        """Where a file is, or is to be."""
        ...

    def has(self, file: str) -> bool:
        """Whether it is here, whole; counts as use."""
        ...

    def hold(self, file: str) -> None:
        """Keeps a file here, which may not be here yet, until it is released as often as it was held."""
        ...

    def release(self, file: str) -> None:
        """See `hold`."""
        ...

    def add(self, file: str, num_bytes: int) -> None:
        """A file that is whole may stay for as long as there is room."""
        ...

    def drop(self, files: Collection[str]) -> None:
        """Removes copies, except those that are held."""
        ...

    def make_way(self, num_bytes: int) -> None:
        """Sees to it that the disk takes so much more of what is new; raises `DiskFullError`."""
        ...

    def spare_space(self) -> AbstractContextManager[None]:
        """In it, a full disk has room enough to delete something."""
        ...

    def upload(self, snapshot: SnapshotRecord, *, owner: str) -> None:
        """Brings a file to where it is kept, wholly or not at all; on a thread. May be repeated.

        Raises:
            OSError: it cannot be read.
            StoreUnavailableError: no room is kept for it (any more).
        """
        ...

    def download(self, snapshot: SnapshotRecord) -> None:
        """Brings a file here, on a thread; raises `OSError`, `NotFoundError`."""
        ...

    def tidy(self) -> None:
        """Removes what was kept elsewhere and nothing refers to any more, on a thread; to be called now and then.

        Raises:
            StoreUnavailableError: later, then.
        """
        ...

    def close(self) -> None:
        """Everything is kept afterwards."""
        ...
