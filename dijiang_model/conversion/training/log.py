"""The log of a training run: one line of JSON for each step."""

import json
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dijiang_model.formats.atomic_file import write_atomically, write_error

LOG_FILE = "log.jsonl"


class TrainingLog:
    """Appends lines; a context manager. Another process than the first keeps none."""

    def __init__(self, folder: Path, *, last_step: int, is_kept: bool = True) -> None:
        """Goes on after `last_step`: what a killed run logged after its last checkpoint comes again, and is dropped.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        self._path = folder / LOG_FILE
        self._file: FileIO | None = None
        if is_kept:
            kept = [json.dumps(line) + "\n" for line in read_log(self._path) if line["step"] <= last_step]
            write_atomically(self._path, "".join(kept).encode())
            self._file = FileIO(self._path, "ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line, at once.

        Raises:
            CheckpointError: the disk is full.
        """
        if self._file is None:
            return
        rest = memoryview((json.dumps(line) + "\n").encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise write_error(self._path, error) from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """The steps of a run, oldest first."""
    if not path.exists():
        return []
    # A killed run may leave half a line at the end.
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
