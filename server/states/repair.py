"""`dijiang state repair`: an embedded store whose index and files do not belong together any more.

Nothing is deleted: the index that was there is kept beside the new one, and files that no index names go to a folder of
their own, from where `dijiang state import` takes them.
"""

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dijiang_model.program import program
from server.states.errors import StoreError
from server.states.files.local import INDEX_FILE, LocalFiles
from server.states.index.schema import ensure_tables
from server.states.index.sqlite import Sqlite

LOST_FOLDER = "lost"
_TABLES = ("snapshots", "states", "points", "responses")
_DEFAULTS: dict[str, Any] = {"owner": "", "text_bytes": 0, "claims": 0}
_WITHOUT_SNAPSHOT = (
    "DELETE FROM points WHERE snapshot NOT IN (SELECT file FROM snapshots)",
    "DELETE FROM states WHERE head NOT IN (SELECT file FROM snapshots)",
    "DELETE FROM points WHERE state NOT IN (SELECT id FROM states)",
    "UPDATE responses SET snapshot = NULL WHERE snapshot NOT IN (SELECT file FROM snapshots)",
    "DELETE FROM uses",
    "DELETE FROM replicas",
)


@dataclass(frozen=True, slots=True)
class Repair:
    """What was done.

    Attributes:
        num_states: that are there now.
        num_lost_states: that the index named, and whose files are missing or cut off.
        num_files: that no index names, now in the folder of lost files.
        old_index: where the index is that was replaced; None: it was not.
    """

    num_states: int
    num_lost_states: int
    num_files: int
    old_index: Path | None


def repair(folder: Path) -> Repair:
    """Makes a store usable again.

    Raises:
        StoreError: a server uses it, or it is none.
    """
    if not folder.is_dir():
        raise StoreError(f"there is no folder {folder}")
    files = LocalFiles(folder)
    try:
        old_index = None if _is_whole(folder / INDEX_FILE) else _rebuilt(folder / INDEX_FILE)
        _migrate(folder / INDEX_FILE)
        return _reconciled(folder, files.folder, old_index)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"the folder of states {folder} cannot be repaired: {error}") from error
    finally:
        files.close()


def _is_whole(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    try:
        Sqlite(path, clock=time.time).close()
    except sqlite3.Error:
        return False
    return True


def _migrate(path: Path) -> None:
    database = Sqlite(path, clock=time.time)
    try:
        with database.changing() as transaction:
            ensure_tables(database, transaction)
    finally:
        database.close()


def _rebuilt(path: Path) -> Path | None:
    """Replaces an index by what can still be read of it; where the old one is, if there was one."""
    old = None
    if path.exists():
        old = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        for suffix in ("-wal", "-shm", ""):
            part = path.with_name(path.name + suffix)
            if part.exists():
                part.rename(old.with_name(old.name + suffix))
    _migrate(path)
    if old is not None:
        _copy_rows(old, path)
    return old


def _copy_rows(old: Path, new: Path) -> None:
    source, target = sqlite3.connect(old), sqlite3.connect(new)
    source.row_factory = sqlite3.Row
    try:
        for table in _TABLES:
            columns = [row[1] for row in target.execute(f"PRAGMA table_info({table})")]
            values = f"({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
            statement = f"INSERT OR IGNORE INTO {table} {values}"
            for order in ("ASC", "DESC"):
                for row in _readable(source, f"SELECT * FROM {table} ORDER BY 1 {order}"):  # noqa: S608 (constants)
                    found = {**_DEFAULTS, **{key: row[key] for key in row.keys()}}  # noqa: SIM118
                    target.execute(statement, [found.get(column) for column in columns])
        target.commit()
    finally:
        source.close()
        target.close()


def _readable(source: sqlite3.Connection, statement: str) -> list[sqlite3.Row]:
    """Rows up to the first one that cannot be read."""
    rows: list[sqlite3.Row] = []
    try:
        for row in source.execute(statement):
            rows.append(row)  # noqa: PERF402 (those before an error stay)
    except sqlite3.Error:
        pass
    return rows


def _reconciled(folder: Path, files: Path, old_index: Path | None) -> Repair:
    index = sqlite3.connect(folder / INDEX_FILE)
    try:
        known = dict(index.execute("SELECT file, num_bytes FROM snapshots"))
        found = {path.name: path.stat().st_size for path in files.iterdir() if not path.name.startswith(".")}
        gone = [file for file, num_bytes in known.items() if found.get(file) != num_bytes]
        (before,) = index.execute("SELECT count(*) FROM states").fetchone()
        # Foreign keys are not enforced on this connection, so that what refers to lost files may go after them.
        index.executemany("DELETE FROM snapshots WHERE file = ?", [(file,) for file in gone])
        for statement in _WITHOUT_SNAPSHOT:
            index.execute(statement)
        (after,) = index.execute("SELECT count(*) FROM states").fetchone()
        index.commit()
    finally:
        index.close()
    unnamed = found.keys() - (known.keys() - {*gone})
    if unnamed:
        (folder / LOST_FOLDER).mkdir(exist_ok=True, mode=0o700)
    for name in unnamed:
        (files / name).rename(folder / LOST_FOLDER / name)
    return Repair(after, before - after, len(unnamed), old_index)


def repair_command(
    folder: Annotated[Path, typer.Argument(help="Folder of saved states (--states-folder), used by no server.")],
) -> None:
    """Make a folder of saved states usable again whose index is missing, damaged, or of other files."""
    try:
        done = repair(folder)
    except StoreError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(
        f"states that are there: {done.num_states}; given up, for their files are not whole: {done.num_lost_states}"
    )
    if done.old_index is not None:
        typer.echo(f"the damaged index is {done.old_index} now, and what could be read of it is in the new one")
    if done.num_files:
        typer.echo(
            f"files that the index does not name, now in {folder / LOST_FOLDER}: {done.num_files}; "
            f"`{program()} state import` takes in those that are whole"
        )
