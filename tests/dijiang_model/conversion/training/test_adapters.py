"""Adapters: merged in memory or on disk they compute the same; another base and damaged files are refused."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.checkpoints.config_json import read_stored_config
from dijiang_model.checkpoints.fingerprint import model_fingerprint
from dijiang_model.config import FeatureConfig
from dijiang_model.conversion.calibration.calibrate import Calibration
from dijiang_model.conversion.default_model import ADAPTER, REPORT
from dijiang_model.conversion.training.adapters import (
    Adapter,
    AdapterInfo,
    adapted_model,
    apply_adapter,
    load_adapter,
    save_adapter,
)
from dijiang_model.errors import CheckpointError, ConfigError
from dijiang_model.families import build_model
from dijiang_model.ops.training.attention import HybridAttention
from dijiang_model.segments import run_segments
from tests.tiny_models import HYBRID, llama_config, random_tensors, write_tiny_model

LAYER = replace(HYBRID, window=9, features=FeatureConfig(bases=("dct4",), nodes="signed_sphere", far_rank=2))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "base", llama_config(HYBRID, HYBRID))


def made_for(base: Path, *, with_updates: bool = True) -> Adapter:
    config = llama_config(LAYER, LAYER)
    kernels = {name: tensor for name, tensor in random_tensors(config, seed=9).items() if ".linear." in name}
    generator = torch.Generator().manual_seed(1)
    updates = {}
    for name, (rows, columns) in {"q_proj": (64, 64), "k_proj": (32, 64)}.items() if with_updates else ():
        weight = f"model.layers.1.self_attn.{name}.weight"
        updates[f"{weight}.lora_down"] = torch.randn((3, columns), generator=generator)
        updates[f"{weight}.lora_up"] = 0.1 * torch.randn((rows, 3), generator=generator)
    info = AdapterInfo("base", model_fingerprint(load_model(base)), 1000, 3, "a test")
    return Adapter(info, [asdict(layer) for layer in config.layers], kernels | updates)


def logits(folder_or_model: object) -> torch.Tensor:
    model = load_model(folder_or_model) if isinstance(folder_or_model, Path) else folder_or_model
    ids = torch.arange(60)[None]
    return model.logits(run_segments(model, ids, HybridAttention()))  # type: ignore[attr-defined]


def test_an_adapter_reads_back_as_it_was_written(base: Path, tmp_path: Path) -> None:
    adapter = made_for(base)
    save_adapter(adapter, tmp_path / "a.safetensors")
    found = load_adapter(tmp_path / "a.safetensors")
    assert found.info == adapter.info
    assert found.config(llama_config(HYBRID, HYBRID)).layers == (LAYER, LAYER)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in adapter.tensors.items())


def test_merged_on_disk_is_merged_in_memory(base: Path, tmp_path: Path) -> None:
    adapter = made_for(base)
    in_memory = adapted_model(load_model(base), adapter)
    apply_adapter(base, adapter, tmp_path / "out", card="# A card\n")
    assert torch.equal(logits(tmp_path / "out"), logits(in_memory))
    assert not torch.allclose(logits(base), logits(in_memory), rtol=1e-2)
    assert read_stored_config(tmp_path / "out").origin.tokens_trained == 1000
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "README.md").read_text() == "# A card\n"


def test_updates_change_their_weights_alone(base: Path) -> None:
    model = load_model(base)
    before, after = model.state_dict(), adapted_model(model, made_for(base)).state_dict()
    changed = {name for name in before if ".linear." not in name and not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.1.self_attn.{name}.weight" for name in ("q_proj", "k_proj")}


def test_the_wrong_base_is_refused(base: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", llama_config(HYBRID, HYBRID), seed=1)
    adapter = made_for(base)
    with pytest.raises(CheckpointError, match=r"was trained on base .* this model is another one"):
        adapted_model(load_model(other), adapter)
    with pytest.raises(CheckpointError, match="another one"):
        apply_adapter(other, adapter, tmp_path / "out", card="")
    assert not (tmp_path / "out").exists()


def test_the_storage_dtype_of_a_base_does_not_matter(base: Path) -> None:
    assert model_fingerprint(load_model(base, dtype=torch.bfloat16)) == model_fingerprint(load_model(base))


def test_what_does_not_fit_is_listed(base: Path) -> None:
    adapter = made_for(base)
    tensors = dict(adapter.tensors)
    del tensors["model.layers.0.self_attn.linear.nodes"]
    tensors["model.layers.1.self_attn.linear.nodes"] = torch.zeros(2, 3)
    tensors["model.layers.7.self_attn.q_proj.weight.lora_up"] = torch.zeros(64, 3)
    with pytest.raises(CheckpointError) as caught:
        adapted_model(load_model(base), replace(adapter, tensors=tensors))
    for expected in ("layers.0.self_attn.linear.nodes is missing", "has the shape [2, 3]", "layers.7"):
        assert expected in str(caught.value)


def test_layers_that_this_code_does_not_know_are_refused(base: Path) -> None:
    adapter = made_for(base)
    layers = [dict(layer) for layer in adapter.layers]
    layers[0]["a_newer_setting"] = 1
    with pytest.raises(ConfigError, match="a_newer_setting"):
        adapted_model(load_model(base), replace(adapter, layers=layers))


def test_damaged_files_are_refused(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="not a readable adapter"):
        load_adapter(path)
    save_adapter(made_for(base), path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="not a readable adapter"):
        load_adapter(path)
    with pytest.raises(CheckpointError, match="no adapter of the format"):
        load_adapter(base / "model.safetensors")


def test_values_that_are_not_finite_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = made_for(base)
    tensors = dict(adapter.tensors)
    name = "model.layers.0.self_attn.linear.nodes"
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_adapter(replace(adapter, tensors=tensors), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        load_adapter(tmp_path / "a.safetensors")


def test_a_new_layout_builds_from_the_adapter(base: Path) -> None:
    model = adapted_model(load_model(base), made_for(base, with_updates=False))
    assert model.config == llama_config(LAYER, LAYER)
    assert model.state_dict().keys() == build_model(llama_config(LAYER, LAYER)).state_dict().keys()


def test_the_packaged_adapter_reads_and_is_small() -> None:
    adapter = load_adapter(ADAPTER)
    assert ADAPTER.stat().st_size < 30 * 10**6
    assert len(adapter.layers) == 30
    assert all("anchors" in layer for layer in adapter.layers)
    assert adapter.calibration is not None
    calibration = Calibration.parse(adapter.calibration)
    assert calibration.state_bytes == 8 * 2**20
    assert f"{calibration.num_contexts} contexts, {calibration.num_tokens:,} tokens" in REPORT.read_text()
