"""Saving: what is written reads back, a folder appears complete or not at all, one tensor is in memory at a time."""

import errno
import json
import struct
import weakref
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dijiang_model.checkpoints import atomic_folder as atomic_folder_module
from dijiang_model.checkpoints.atomic_folder import atomic_folder
from dijiang_model.checkpoints.checkpoint import load_model, save_model
from dijiang_model.checkpoints.config_json import Origin, read_stored_config
from dijiang_model.errors import CheckpointError, ModelError
from dijiang_model.formats.safetensors_writer import num_bytes, plan_shards, write_tensors
from dijiang_model.formats.tensor_files import TensorInfo, open_tensors
from tests.dijiang_model.stepping import logits_of, random_text
from tests.tiny_models import gpt_neox_config, llama_config, tiny_model

ORIGIN = Origin(recipe="hybrid", teacher="random", tokens_trained=5)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("config", [llama_config(), gpt_neox_config()], ids=["llama", "gpt_neox"])
def test_a_saved_model_computes_the_same_after_loading(tmp_path: Path, config: object) -> None:
    model = tiny_model(config)  # type: ignore[arg-type]
    save_model(model, tmp_path / "m", origin=ORIGIN)
    loaded = load_model(tmp_path / "m")
    text = random_text(30)
    assert loaded.config == model.config
    assert torch.equal(logits_of(loaded, text), logits_of(model, text))
    assert read_stored_config(tmp_path / "m").origin == ORIGIN


def test_shards_have_an_index_and_read_back(tmp_path: Path) -> None:
    model = tiny_model()
    save_model(model, tmp_path / "m", origin=ORIGIN, max_shard_bytes=40_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    shards = {name for name in names_in(tmp_path / "m") if name.endswith(".safetensors")}
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == shards
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    loaded = load_model(tmp_path / "m").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_files_are_ordinary_safetensors_with_aligned_data(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    save_model(model, tmp_path / "m", origin=ORIGIN)
    path = tmp_path / "m" / "model.safetensors"
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, model.state_dict()[name])
    (header_bytes,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert (8 + header_bytes) % 64 == 0


infos = st.dictionaries(
    st.text("abc.", min_size=1, max_size=8),
    st.builds(
        TensorInfo,
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.bool]),
    ),
    min_size=1,
    max_size=9,
)


@settings(deadline=None)
@given(infos, st.integers(1, 500))
def test_any_tensors_are_split_in_order_and_within_the_limit(tensors: dict[str, TensorInfo], limit: int) -> None:
    shards = plan_shards(tensors, limit)
    assert [name for shard in shards for name in shard.names] == list(tensors)
    for shard in shards:
        assert len(shard.names) == 1 or sum(num_bytes(tensors[name]) for name in shard.names) <= limit


@settings(deadline=None)
@given(infos, st.integers(1, 500))
def test_any_tensors_read_back(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, TensorInfo], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("m")
    values = {name: torch.ones(info.shape).to(info.dtype) for name, info in tensors.items()}
    write_tensors(folder, tensors, values.__getitem__, max_shard_bytes=limit)
    source = open_tensors(folder)
    assert source.infos() == tensors
    assert all(torch.equal(source.read(name), value) for name, value in values.items())


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def read(name: str) -> Tensor:
        nonlocal most
        most = max(most, len(alive))
        tensor = torch.zeros(1000)
        alive.add(tensor)
        return tensor

    tensors = {f"t{index}": TensorInfo((1000,), torch.float32) for index in range(50)}
    write_tensors(tmp_path, tensors, read, max_shard_bytes=20_000)
    assert most <= 1


def test_an_exception_midway_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "m") as folder:
            (folder / "half").write_text("half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        write()
    assert names_in(tmp_path) == set()


def test_what_a_killed_writer_left_cannot_be_loaded_and_is_removed_by_the_next(tmp_path: Path) -> None:
    model = tiny_model()
    leftover = tmp_path / ".m.partial-killed"
    save_model(model, leftover, origin=ORIGIN)
    (leftover / "config.json").unlink()  # it is written last
    with pytest.raises(ModelError):
        load_model(leftover)
    save_model(model, tmp_path / "m", origin=ORIGIN)
    assert names_in(tmp_path) == {"m"}


def test_the_config_is_written_after_everything_else(tmp_path: Path) -> None:
    seen: list[set[str]] = []
    save_model(tiny_model(), tmp_path / "m", origin=ORIGIN, fill=lambda folder: seen.append(names_in(folder)))
    assert seen == [{"model.safetensors"}]


def test_an_existing_model_is_only_replaced_on_request(tmp_path: Path) -> None:
    save_model(tiny_model(seed=1), tmp_path / "m", origin=ORIGIN)
    before = load_model(tmp_path / "m").state_dict()
    with pytest.raises(CheckpointError, match="--overwrite"):
        save_model(tiny_model(seed=2), tmp_path / "m", origin=ORIGIN)
    assert all(torch.equal(t, before[name]) for name, t in load_model(tmp_path / "m").state_dict().items())
    save_model(tiny_model(seed=2), tmp_path / "m", origin=ORIGIN, overwrite=True)
    after = load_model(tmp_path / "m").state_dict()
    assert all(torch.equal(t, after[name]) for name, t in tiny_model(seed=2).state_dict().items())
    assert names_in(tmp_path) == {"m"}


def test_a_failed_overwrite_keeps_the_old_model(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path / "m", origin=ORIGIN)

    def fail(folder: Path) -> None:
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError):
        save_model(tiny_model(), tmp_path / "m", origin=ORIGIN, overwrite=True, fill=fail)
    load_model(tmp_path / "m")
    assert names_in(tmp_path) == {"m"}


def test_an_empty_folder_may_be_filled_and_a_file_may_not_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_model(tiny_model(), tmp_path / "m", origin=ORIGIN)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="not a folder"):
        save_model(tiny_model(), tmp_path / "file", origin=ORIGIN, overwrite=True)


def test_two_writers_of_one_folder_exclude_each_other(tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".m.dijiang-lock"),
        pytest.raises(CheckpointError, match="another process"),
        atomic_folder(tmp_path / "m"),
    ):
        raise AssertionError


def test_too_little_space_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="bytes free"), atomic_folder(tmp_path / "m", needed_bytes=2**60):
        raise AssertionError
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("number", "part"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EIO, "cannot be written")],
)
def test_a_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, part: str) -> None:
    def fail(file: object) -> None:
        raise OSError(number, "injected")

    monkeypatch.setattr("dijiang_model.formats.safetensors_writer.flush_to_disk", fail)
    with pytest.raises(CheckpointError, match=part):
        save_model(tiny_model(), tmp_path / "m", origin=ORIGIN)
    assert names_in(tmp_path) == set()


def test_the_folder_is_on_the_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    real = atomic_folder_module._sync_folder

    def sync(folder: Path) -> None:
        synced.append((tmp_path / "m").exists())
        real(folder)

    monkeypatch.setattr(atomic_folder_module, "_sync_folder", sync)
    save_model(tiny_model(), tmp_path / "m", origin=ORIGIN)
    assert synced == [False, True]
