"""Files that stand where another one should be: empty ones, and the pointers of Git LFS."""

from pathlib import Path

LFS_HEAD = b"version https://git-lfs.github.com/spec/"


def stub_problem(path: Path) -> str | None:
    """Returns in words why an existing file holds nothing to read; None where it may.

    Raises:
        OSError: it cannot be read.
    """
    if path.stat().st_size == 0:
        return f"{path} is empty"
    with path.open("rb") as file:
        if file.read(len(LFS_HEAD)) == LFS_HEAD:
            return f"{path} is a Git LFS pointer, not the file; `git lfs pull` in its repository fetches it"
    return None
