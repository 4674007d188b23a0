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
        reason = "no space left on its disk" if error.errno == errno.ENOSPC else error.strerror
        raise CheckpointError(f"{path} cannot be written: {reason}") from error
