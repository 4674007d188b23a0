"""What is the embedded store's alone: its folder, whole after any end, for one server."""

from pathlib import Path

import pytest

from server.states.errors import StoreError
from tests.server.states.stores import EmbeddedKind, make

pytestmark = pytest.mark.anyio


@pytest.fixture
def kind(tmp_path: Path) -> EmbeddedKind:
    return EmbeddedKind(tmp_path)


async def test_what_a_crash_leaves_behind_is_swept(kind: EmbeddedKind) -> None:
    first = kind.open()
    whole, lost, cut = await make(first), await make(first), await make(first)
    await first.close()
    (first.files_folder / "orphan.safetensors").write_bytes(b"never named")
    (first.files_folder / ".half.safetensors.partial").write_bytes(b"never renamed")
    (first.files_folder / lost.head.file).unlink()
    (first.files_folder / cut.head.file).write_bytes(b"short")
    second = kind.open()
    assert [state.id for state in await second.list_states("ann", limit=9, after=None, name=None)] == [whole.id]
    await second.close()
    third = kind.open()
    assert kind.num_files() == 1
    await third.close()


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
