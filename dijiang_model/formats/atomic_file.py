"""A file that appears complete or not at all."""

import errno
import os
from pathlib import Path

from dijiang_model.errors import CheckpointError


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside the place, flushes to the disk, then renames.

    Raises:
        CheckpointError: the disk is full or not writable; what was there before is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> CheckpointError:
    """A failure to write `path`, in words."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "no space left on its disk" if is_full else error.strerror
    return CheckpointError(f"{path} cannot be written: {reason}")
