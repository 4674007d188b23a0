"""How much a disk still takes."""

import shutil
from pathlib import Path

from server.states.errors import DiskFullError


def free_bytes(folder: Path) -> int:
    """Of the folder's disk, for this user."""
    return shutil.disk_usage(folder).free


def require_disk(folder: Path, num_bytes: int) -> None:
    """Raises `DiskFullError` where so many bytes do not fit."""
    if free_bytes(folder) < num_bytes:
        raise DiskFullError
