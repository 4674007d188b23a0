"""`dijiang state repair`: what is whole is kept, what is not is named, and nothing is deleted."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.states.errors import StoreError
from server.states.repair import repair
from tests.server.states.stores import EmbeddedKind, make, put_response

pytestmark = pytest.mark.anyio


async def filled(folder: Path) -> list[str]:
    """A store with two states, one of them with a point, and a response; the states' files."""
    store = EmbeddedKind(folder).open(max_bytes=10**6)
    states = [await make(store, name=f"n{number}") for number in range(2)]
    await store.mark("ann", states[0].id, "here")
    await put_response(store, "resp_1", "completed")
    await store.close()
    return [state.head.file for state in states]


async def names(folder: Path) -> list[str | None]:
    store = EmbeddedKind(folder).open(max_bytes=10**6)
    found = [state.name for state in await store.list_states("ann", limit=9, after=None, name=None)]
    assert (await store.get_response("ann", "resp_1")).has_ended
    await make(store)
    await store.close()
    return found


async def test_a_lost_file_costs_its_state_alone(tmp_path: Path) -> None:
    files = await filled(tmp_path)
    (tmp_path / "files" / files[0]).unlink()
    (tmp_path / "files" / "unknown.safetensors").write_bytes(b"of whom")
    done = repair(tmp_path)
    assert (done.num_states, done.num_lost_states, done.num_files, done.old_index) == (1, 1, 1, None)
    assert (tmp_path / "lost" / "unknown.safetensors").read_bytes() == b"of whom"
    assert await names(tmp_path) == ["n1"]


async def test_a_file_that_was_cut_off_is_put_aside(tmp_path: Path) -> None:
    files = await filled(tmp_path)
    (tmp_path / "files" / files[1]).write_bytes(b"short")
    assert repair(tmp_path).num_files == 1
    assert (tmp_path / "lost" / files[1]).read_bytes() == b"short"
    assert await names(tmp_path) == ["n0"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
async def test_files_without_an_index_are_put_aside(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    await filled(tmp_path)
    damage(tmp_path / "states.db")
    done = repair(tmp_path)
    assert (done.num_states, done.num_files) == (0, 3)
    store = EmbeddedKind(tmp_path).open()
    await make(store)
    await store.close()


async def test_a_damaged_index_is_kept_and_what_can_be_read_of_it_goes_on(tmp_path: Path) -> None:
    await filled(tmp_path)
    index = sqlite3.connect(tmp_path / "states.db")
    (page,) = index.execute("SELECT rootpage FROM sqlite_master WHERE name = 'states_by_use'").fetchone()
    (size,) = index.execute("PRAGMA page_size").fetchone()
    index.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    index.close()
    with (tmp_path / "states.db").open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    with pytest.raises(StoreError, match=r"cannot be used: .*`dijiang state repair"):
        EmbeddedKind(tmp_path).open()
    done = repair(tmp_path)
    assert (done.num_states, done.num_lost_states, done.num_files) == (2, 0, 0)
    assert done.old_index is not None
    assert done.old_index.exists()
    assert sorted(name or "" for name in await names(tmp_path)) == ["n0", "n1"]


async def test_a_store_in_use_is_left_alone(tmp_path: Path) -> None:
    store = EmbeddedKind(tmp_path).open()
    with pytest.raises(StoreError, match="another server uses the states"):
        repair(tmp_path)
    await store.close()


async def test_the_command_says_what_it_has_done(tmp_path: Path) -> None:
    files = await filled(tmp_path)
    (tmp_path / "files" / files[0]).unlink()
    done = CliRunner().invoke(app, ["state", "repair", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "are there: 1; given up, for their files are not whole: 1" in done.output
    assert CliRunner().invoke(app, ["state", "repair", str(tmp_path / "none")]).exit_code == 1
