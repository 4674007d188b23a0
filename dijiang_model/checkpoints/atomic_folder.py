"""A folder that appears complete or not at all.

It is filled under a hidden name beside its place and renamed when all its bytes are on the disk. A
process that is killed leaves only the hidden folder, which the next writer of the same place removes.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dijiang_model.checkpoints.outputs import check_replaceable, holds_only_model_files, output_folder
from dijiang_model.errors import CheckpointError

REPLACED = "old"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_folder(out: Path, *, overwrite: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """Yields an empty folder that becomes `out` when the block ends without an exception.

    Args:
        out: the place, or a link to it; its parent is created.
        overwrite: replace a model that this program saved there (`outputs.check_replaceable`).
        needed_bytes: refused at once where the disk has fewer bytes free.

    Raises:
        CheckpointError: `out` is in the way, another process writes it, or the disk is full or not writable.
    """
    out = output_folder(out, inputs=())
    try:
        check_replaceable(out, overwrite=overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(out):
            _remove_leftovers(out)
            _check_space(out.parent, needed_bytes)
            partial = _new_folder(out)
            try:
                yield partial
                _sync_folder(partial)
                check_replaceable(out, overwrite=overwrite)
                _move_into_place(partial, out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise _write_error(out, error) from error


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    path = out.parent / f".{out.name}.dijiang-lock"
    try:
        with FileLock(path, timeout=0):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout as error:
        if not path.exists():  # a place where no file can be made, such as /proc
            raise CheckpointError(f"{out} cannot be written: {out.parent} takes no files") from error
        raise CheckpointError(f"another process is writing {out}") from error


def _new_folder(out: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
    folder.chmod(0o755)  # mkdtemp makes it private; the model may be served by another user
    return folder


def _prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _remove_leftovers(out: Path) -> None:
    """Removes what killed writers of the same place left; only the holder of the lock may call it."""
    for leftover in out.parent.iterdir():
        if leftover.name.startswith(_prefix(out)) and _is_own(leftover):
            if (leftover / REPLACED).is_dir() and not out.exists():  # killed between two renames
                (leftover / REPLACED).rename(out)
            shutil.rmtree(leftover, ignore_errors=True)


def _is_own(leftover: Path) -> bool:
    """Whether it holds a model, or the model that was about to be replaced."""
    if leftover.is_symlink() or not leftover.is_dir():
        return False
    replaced = leftover / REPLACED
    return holds_only_model_files(replaced if replaced.is_dir() else leftover)


def _check_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise CheckpointError(f"{folder} has {free:,} bytes free, the model needs {needed_bytes:,}")


def _move_into_place(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
    else:
        replaced = _new_folder(out)
        out.rename(replaced / REPLACED)
        partial.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    _sync_folder(out.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(out: Path, error: OSError) -> CheckpointError:
    if error.errno in _DISK_FULL:
        return CheckpointError(f"no space left on the disk of {out.parent}; nothing was written to {out}")
    return CheckpointError(f"{out} cannot be written: {error.strerror or error}")
