"""What is the embedded store's alone: its folder, whole after any end, for one server."""

from pathlib import Path

import pytest

from server.states.errors import StoreError
from tests.server.states.stores import SIZE, EmbeddedKind, die, make, write

pytestmark = pytest.mark.anyio


@pytest.fixture
def kind(tmp_path: Path) -> EmbeddedKind:
    return EmbeddedKind(tmp_path)


async def test_what_a_crash_leaves_behind_is_swept(kind: EmbeddedKind) -> None:
    first = kind.open()
    whole = await make(first)
    room = first.room(2, bytes_each=SIZE, owner="ann")
    write(await room.__aenter__())
    (first.files_folder / f".{whole.head.file}.partial").write_bytes(b"never renamed")
    die(first)
    second = kind.open()
    assert [state.id for state in await second.list_states("ann", limit=9, after=None, name=None)] == [whole.id]
    assert kind.num_files() == 1
    await second.close()


async def test_a_file_that_was_about_to_be_removed_goes_at_the_next_start(
    kind: EmbeddedKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = kind.open()
    state = await make(first)
    monkeypatch.setattr(first._files, "remove", lambda files: None)
    await first.delete("ann", state.id)
    die(first)
    assert kind.num_files() == 1
    second = kind.open()
    assert kind.num_files() == 0
    await second.close()


@pytest.mark.parametrize("damage", ["lost", "cut", "unknown"])
async def test_files_that_the_index_does_not_know_stop_the_start_and_nothing_is_removed(
    kind: EmbeddedKind, damage: str
) -> None:
    first = kind.open()
    await make(first)
    state = await make(first)
    await first.close()
    file = first.files_folder / state.head.file
    if damage == "lost":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(b"short")
    else:
        file.with_name("unknown.safetensors").write_bytes(b"of another index")
    before = kind.num_files()
    with pytest.raises(StoreError, match=r"do not belong together: .* nothing was removed.*`dijiang state repair"):
        kind.open()
    assert kind.num_files() == before


@pytest.mark.parametrize("is_empty", [True, False])
async def test_files_without_an_index_stop_the_start_and_nothing_is_removed(
    kind: EmbeddedKind, tmp_path: Path, is_empty: bool
) -> None:
    first = kind.open()
    await make(first)
    await first.close()
    (tmp_path / "states.db").unlink()
    if is_empty:
        (tmp_path / "states.db").touch()
    for _ in range(2):
        with pytest.raises(StoreError, match=r"missing or empty; nothing was removed.*`dijiang state repair"):
            kind.open()
    assert kind.num_files() == 1


async def test_a_second_server_in_the_same_folder_is_refused(kind: EmbeddedKind) -> None:
    store = kind.open()
    with pytest.raises(StoreError, match="another server uses the states"):
        kind.open()
    await store.close()


async def test_a_damaged_index_is_a_sentence_and_nothing_is_removed(kind: EmbeddedKind, tmp_path: Path) -> None:
    first = kind.open()
    state = await make(first)
    await first.close()
    for path in [*tmp_path.glob("states.db*")]:  # noqa: ASYNC240
        path.write_bytes(b"no database at all" * 100)
    with pytest.raises(StoreError, match="cannot be used"):
        kind.open()
    assert (first.files_folder / state.head.file).exists()
