"""Loading is strict and atomic: whatever is wrong with a folder is listed, and nothing of it is executed."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dijiang_model.checkpoints.checkpoint import load_config, load_model
from dijiang_model.errors import CheckpointError, ConfigError, ModelError
from tests.dijiang_model.checkpoints.golden_checkpoints import FOLDER, NAMES, load_golden
from tests.dijiang_model.stepping import logits_of, random_text
from tests.tiny_models import gpt_neox_config, llama_config, tiny_model, write_tiny_model

WEIGHTS = "model.safetensors"
MIX_BIAS = "model.layers.0.self_attn.linear.mix_bias"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"

Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def change(folder: Path, edit: Callable[[Tensors], object]) -> Path:
    """Rewrites the folder's weights after `edit`."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def test_own_format_computes_what_was_saved(tmp_path: Path) -> None:
    for config in (llama_config(), gpt_neox_config()):
        loaded = load_model(write_tiny_model(tmp_path / config.family, config))
        assert loaded.config == config
        assert load_config(tmp_path / config.family) == config
        text = random_text(20)
        assert torch.equal(logits_of(loaded, text), logits_of(tiny_model(config), text))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_checkpoints_load_their_tensors_unchanged(name: str, dtype: torch.dtype) -> None:
    golden = load_golden(name)
    model = load_model(golden.path, dtype=dtype)
    assert model.config.layers == golden.config.layers
    assert model.config.position_table_length == golden.config.position_table_length
    state = model.state_dict()
    assert state.keys() == golden.tensors.keys()
    for tensor_name, tensor in golden.tensors.items():
        if tensor_name.endswith("log_decay"):  # not in the files: two ways to compute it
            assert torch.allclose(state[tensor_name], tensor.to(dtype), rtol=1e-12 if dtype == torch.float64 else 1e-6)
        else:
            assert torch.equal(state[tensor_name], tensor.to(dtype)), tensor_name


@pytest.mark.parametrize("name", NAMES)
def test_golden_checkpoints_compute_the_released_logits(name: str) -> None:
    golden = load_golden(name)
    model = load_model(golden.path, dtype=torch.float64)
    logits = torch.stack([logits_of(model, row.tolist()) for row in golden.input_ids])
    assert (logits - golden.logits).norm() <= 1e-6 * golden.logits.norm()  # the released run rounds RoPE in fp32


def test_sharded_and_safetensors_forms_of_a_released_checkpoint_are_equal(tmp_path: Path) -> None:
    tensors = torch.load(FOLDER / "aligned" / "pytorch_model.bin", weights_only=True)
    expected = load_model(FOLDER / "aligned").state_dict()
    for kind in ("sharded.bin", "legacy.bin", "safetensors"):
        folder = tmp_path / kind
        folder.mkdir()
        shutil.copy(FOLDER / "aligned" / "config.json", folder)
        _save_as(kind, tensors, folder)
        state = load_model(folder).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def _save_as(kind: str, tensors: Tensors, folder: Path) -> None:
    if kind == "safetensors":
        save_file(tensors, folder / WEIGHTS)
    elif kind == "legacy.bin":
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        names = sorted(tensors)
        shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        for shard, members in shards.items():
            torch.save({name: tensors[name] for name in members}, folder / shard)
        weight_map = {name: shard for shard, members in shards.items() for name in members}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_weights_stay_mapped_files_where_the_dtype_fits(folder: Path) -> None:
    model = load_model(folder)
    mapped = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    assert folder / WEIGHTS in mapped
    assert model.dtype == torch.float32


def test_narrower_weights_keep_the_kernel_in_fp32(folder: Path) -> None:
    model = load_model(folder, dtype=torch.bfloat16)
    state = model.state_dict()
    assert state[Q_PROJ].dtype == torch.bfloat16
    assert state[MIX_BIAS].dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_missing_surplus_and_misshapen_tensors_are_all_listed(folder: Path) -> None:
    def edit(tensors: Tensors) -> None:
        del tensors[MIX_BIAS]
        tensors["model.surprise.weight"] = torch.zeros(2)
        tensors[Q_PROJ] = torch.zeros(3, 64)
        tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int32)

    with pytest.raises(CheckpointError) as caught:
        load_model(change(folder, edit))
    for part in (
        f"{MIX_BIAS} [4] is missing",
        "model.surprise.weight [2] is surplus",
        f"{Q_PROJ} has the shape [3, 64], the config asks for [64, 64]",
        "model.norm.weight has the dtype torch.int32",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[Q_PROJ][-1, -1] = value
        tensors["model.norm.weight"][0] = value

    with pytest.raises(CheckpointError, match="not finite") as caught:
        load_model(change(folder, edit))
    assert Q_PROJ in str(caught.value)
    assert "model.norm.weight" in str(caught.value)


def test_a_silent_mixing_bias_is_allowed_but_not_a_nan(folder: Path) -> None:
    load_model(change(folder, lambda tensors: tensors[MIX_BIAS].fill_(-float("inf"))))
    for value in (float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match="mix_bias"):
            load_model(change(folder, lambda tensors, value=value: tensors[MIX_BIAS].fill_(value)))


def test_large_finite_values_whose_sum_overflows_are_allowed(folder: Path) -> None:
    load_model(change(folder, lambda tensors: tensors[Q_PROJ].fill_(3e38)))


def test_values_too_large_for_the_dtype_are_refused(folder: Path) -> None:
    change(folder, lambda tensors: tensors[Q_PROJ].fill_(1e6))
    with pytest.raises(CheckpointError, match="cannot represent it"):
        load_model(folder, dtype=torch.float16)


def test_known_constants_of_hf_checkpoints_are_tolerated(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "aligned", tmp_path / "m", copy_function=shutil.copyfile)
    path = tmp_path / "m" / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    attention = "gpt_neox.layers.1.attention."
    tensors[f"{attention}bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    tensors[f"{attention}masked_bias"] = torch.tensor(-1e9)
    tensors[f"{attention}rotary_emb.inv_freq"] = torch.ones(2)
    torch.save(tensors, path)
    load_model(tmp_path / "m")
    tensors[f"{attention}rotary_emb.surprise"] = torch.ones(2)
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match="surprise"):
        load_model(tmp_path / "m")


def test_a_tied_head_may_be_stored_beside_the_embedding(folder: Path) -> None:
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load_model(folder)


class Evil:
    """Runs code when unpickled by an unsafe loader."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (exec, ("import builtins; builtins.dijiang_was_here = True",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    import builtins

    shutil.copy(FOLDER / "aligned" / "config.json", tmp_path)
    path = tmp_path / "pytorch_model.bin"
    for write in (lambda: torch.save({"w": Evil()}, path), lambda: path.write_bytes(pickle.dumps({"w": Evil()}))):
        write()
        with pytest.raises(CheckpointError, match=r"refused|not a readable"):
            load_model(tmp_path)
        assert not hasattr(builtins, "dijiang_was_here")


@pytest.mark.parametrize("entry", [3, "text", {"nested": torch.zeros(1)}, [torch.zeros(1)]])
def test_entries_that_are_no_tensors_are_refused(tmp_path: Path, entry: object) -> None:
    shutil.copy(FOLDER / "aligned" / "config.json", tmp_path)
    torch.save({"w": entry}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a tensor"):
        load_model(tmp_path)


def test_auto_map_is_never_followed(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "aligned", tmp_path / "m", copy_function=shutil.copyfile)
    (tmp_path / "m" / "modeling_gpt_neox_dijiang.py").write_text("raise SystemExit('remote code was run')")
    load_model(tmp_path / "m")


def test_an_unconverted_model_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "aligned" / "config.json", tmp_path)
    save_file({"gpt_neox.embed_in.weight": torch.zeros(97, 64)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="dijiang convert"):
        load_model(tmp_path)


@pytest.mark.parametrize("keep_bytes", [0, 4, 100, 5000])
def test_truncated_weights_are_clear_errors(folder: Path, keep_bytes: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep_bytes])
    with pytest.raises(CheckpointError, match="safetensors"):
        load_model(folder)


def test_a_truncated_torch_file_is_a_clear_error(tmp_path: Path) -> None:
    for keep_bytes in (0, 10, 100_000):
        folder = tmp_path / str(keep_bytes)
        shutil.copytree(FOLDER / "aligned", folder, copy_function=shutil.copyfile)
        path = folder / "pytorch_model.bin"
        path.write_bytes(path.read_bytes()[:keep_bytes])
        with pytest.raises(CheckpointError, match=r"PyTorch file|refused|is empty"):
            load_model(folder)


@pytest.mark.parametrize(
    ("index", "part"),
    [
        ({}, "weight_map"),
        ({"weight_map": {"a": "../../model.safetensors"}}, "plain file name"),
        ({"weight_map": {"a": "gone.safetensors", "b": "lost.safetensors"}}, "lost.safetensors does not exist"),
        ({"weight_map": {"a": "part.safetensors"}}, "a is not in part.safetensors"),
    ],
)
def test_a_damaged_index_is_a_clear_error(folder: Path, index: dict[str, object], part: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).rename(folder / "part.safetensors")
    with pytest.raises(CheckpointError, match=part):
        load_model(folder)


def test_a_folder_without_weights_or_config_is_a_clear_error(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="neither"):
        load_model(folder)
    with pytest.raises(ConfigError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ModelError):
        load_model(folder / "config.json")


def test_tables_that_contradict_the_config_are_refused(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "aligned", tmp_path / "m", copy_function=shutil.copyfile)
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 128}))
    with pytest.raises(CheckpointError, match=r"read_table has the shape \[4, 64\], the config asks for \[4, 128\]"):
        load_model(tmp_path / "m")
