"""Files that stand where another one should be: empty ones, pointers of Git LFS, links to nothing."""

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


def link_problem(folder: Path) -> str | None:
    """Returns which links in a folder lead to nothing, as copies of a hub's snapshot do; None: none does."""
    broken = sorted(path.name for path in folder.iterdir() if path.is_symlink() and not path.exists())
    if not broken:
        return None
    return (
        f"{folder} holds links to files that are not there: {', '.join(broken)}"[:500]
        + "; copy such a folder with `cp -rL`, or fetch it again with `hf download`"
    )
