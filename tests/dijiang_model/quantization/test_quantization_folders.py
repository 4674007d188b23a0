"""Rounded weights in folders: `dijiang quantize`, `dijiang convert --weights`, loading, damage."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dijiang_model.checkpoints.checkpoint import load_model, load_quantization, save_model
from dijiang_model.checkpoints.config_json import Origin, read_stored_config
from dijiang_model.config import ModelConfig
from dijiang_model.conversion.convert import convert
from dijiang_model.conversion.evaluation.evaluate import Variant, score
from dijiang_model.conversion.evaluation.quantized import quantized_variants
from dijiang_model.conversion.quantize import quantize_folder
from dijiang_model.errors import CheckpointError, ConfigError, ConversionError, QuantizationError
from dijiang_model.ops.training.attention import HybridAttention
from dijiang_model.quantization.config import INT8, Quantization, WeightKind
from dijiang_model.quantization.modules import quantized_weights
from dijiang_model.quantization.weight import Int4Weight
from server.cli import app
from tests.dijiang_model.stepping import logits_of, random_text
from tests.tiny_models import gpt_neox_config, llama_config, opt_config, tiny_model, write_tiny_model

CONFIGS = {"llama": llama_config(), "gpt_neox": gpt_neox_config(), "opt": opt_config()}
KINDS: tuple[WeightKind, ...] = ("int8", "int4")
TEXT = random_text(25)


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_when_saved_or_when_loaded_is_the_same_bit_for_bit(
    tmp_path: Path, config: ModelConfig, kind: WeightKind
) -> None:
    folder = write_tiny_model(tmp_path / "whole", config)
    made = quantize_folder(folder, tmp_path / "small", kind=kind)
    saved, loaded = load_model(tmp_path / "small"), load_model(folder, weights=kind)
    assert saved.quantization == loaded.quantization == made.quantization == load_quantization(tmp_path / "small")
    expected = loaded.state_dict()
    assert saved.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.state_dict().items())
    assert torch.equal(logits_of(saved, TEXT), logits_of(loaded, TEXT))


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_rounds_as_the_quantizer_does(tmp_path: Path, config: ModelConfig, kind: WeightKind) -> None:
    folder = write_tiny_model(tmp_path / "whole", config)
    convert(folder, tmp_path / "converted", weights=kind)
    quantize_folder(folder, tmp_path / "quantized", kind=kind)
    ours, theirs = load_model(tmp_path / "converted"), load_model(tmp_path / "quantized")
    assert torch.equal(logits_of(ours, TEXT), logits_of(theirs, TEXT))
    assert "## Quantized weights" in (tmp_path / "converted" / "README.md").read_text()


def test_a_quantized_model_is_saved_and_loaded_as_it_is(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "whole")
    form = Quantization("int4", group_size=64, has_minimums=True)
    model = load_model(folder, weights=form)
    save_model(model, tmp_path / "again", origin=Origin(recipe="hybrid", teacher="random"))
    assert read_stored_config(tmp_path / "again").quantization == form
    assert torch.equal(logits_of(load_model(tmp_path / "again"), TEXT), logits_of(model, TEXT))


def test_codes_stay_in_the_mapped_file_where_their_width_suits_the_kernels(tmp_path: Path) -> None:
    config = llama_config(num_heads=8)  # hidden size 128
    quantize_folder(write_tiny_model(tmp_path / "whole", config), tmp_path / "small", kind="int4")
    model = load_model(tmp_path / "small")
    weight = model.get_submodule("model.layers.0.self_attn.q_proj.weight")
    assert isinstance(weight, Int4Weight)
    assert weight.matrix().pairs == weight.codes.data_ptr()
    # Mapped memory is the file's: no allocation of torch's own lies behind it.
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = [
        line.split()[0].split("-") for line in maps if line.endswith(str(tmp_path / "small" / "model.safetensors"))
    ]
    assert any(int(low, 16) <= weight.codes.data_ptr() < int(high, 16) for low, high in ranges)


def test_rounded_files_hold_no_weight_twice(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "whole", gpt_neox_config())
    quantize_folder(folder, tmp_path / "small", kind="int4")
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    assert "gpt_neox.layers.0.attention.dense.weight" not in tensors
    assert tensors["gpt_neox.layers.0.attention.dense.weight.codes"].dtype == torch.uint8
    assert tensors["gpt_neox.layers.0.attention.dense.weight.codes"].shape == (24, 48)
    assert tensors["embed_out.weight.codes"].dtype == torch.int8
    assert tensors["gpt_neox.layers.0.attention.dense.bias"].dtype == torch.float32


def test_bfloat16_models_keep_the_rest_in_bfloat16(tmp_path: Path) -> None:
    save_model(tiny_model(dtype=torch.bfloat16), tmp_path / "whole", origin=Origin(recipe="hybrid", teacher="random"))
    quantize_folder(tmp_path / "whole", tmp_path / "small", kind="int8")
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    assert load_model(tmp_path / "small", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_weights_are_not_rounded_twice(tmp_path: Path) -> None:
    folder, small = write_tiny_model(tmp_path / "whole"), tmp_path / "small"
    quantize_folder(folder, small, kind="int8")
    assert load_model(small, weights="int8").quantization == INT8
    for attempt in (
        lambda: load_model(small, weights="int4"),
        lambda: quantize_folder(small, tmp_path / "smaller", kind="int4"),
    ):
        with pytest.raises(QuantizationError, match="are int8 already"):
            attempt()
    with pytest.raises(ConversionError, match="are int8; take the model it was made from"):
        convert(small, tmp_path / "converted")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("scales", lambda t: t.fill_(torch.nan), "has values that are not finite"),
        ("scales", lambda t: -t, "scales have negative values"),
        ("minimums", lambda t: t.fill_(torch.inf), "has values that are not finite"),
        ("scales", lambda t: t[:, :1], r"has the shape \[64, 1\], the config asks for \[64, 2\]"),
        ("codes", lambda t: t.float(), "has the dtype torch.float32, must be torch.uint8"),
        ("minimums", lambda t: None, "is missing"),
    ],
)
def test_damaged_codes_and_scales_are_told(tmp_path: Path, name: str, damage: object, message: str) -> None:
    small = tmp_path / "small"
    quantize_folder(write_tiny_model(tmp_path / "whole"), small, kind="int4", has_minimums=True)
    tensors = load_file(small / "model.safetensors")
    key = f"model.layers.1.self_attn.q_proj.weight.{name}"
    changed = damage(tensors[key].clone())  # type: ignore[operator]
    tensors = {k: v for k, v in tensors.items() if k != key} | ({} if changed is None else {key: changed.contiguous()})
    save_file(tensors, small / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_model(small)


def test_a_row_with_codes_but_no_scale_is_damage(tmp_path: Path) -> None:
    small = tmp_path / "small"
    quantize_folder(write_tiny_model(tmp_path / "whole"), small, kind="int8")
    tensors = load_file(small / "model.safetensors")
    tensors["model.embed_tokens.weight.scales"][7] = 0
    save_file(tensors, small / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight: rows with scale 0 have codes"):
        load_model(small)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"weights": "int3"}, r"quantization.weights is \"int3\""),
        ({"weights": "int4", "group_size": 48}, "group_size is 48, must be one of 32, 64"),
        ({"weights": "int8", "group_size": 32}, "int8 weights have no groups"),
        ({"weights": "int8", "zero": 1}, "unknown field dijiang.quantization.zero"),
    ],
)
def test_a_config_that_this_code_does_not_know_is_refused(
    tmp_path: Path, section: dict[str, object], message: str
) -> None:
    folder = write_tiny_model(tmp_path / "whole")
    document = json.loads((folder / "config.json").read_text())
    document["dijiang"]["quantization"] = section
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=message):
        load_model(folder)


def test_unrounded_files_under_a_config_of_rounded_ones_do_not_fit(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "whole")
    document = json.loads((folder / "config.json").read_text())
    document["dijiang"]["quantization"] = {"weights": "int8"}
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight\.codes \[64, 64\] is missing"):
        load_model(folder)


def test_the_command_rounds_and_says_what_it_did(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "whole")
    result = CliRunner().invoke(app, ["quantize", str(folder), str(tmp_path / "small"), "--no-minimums"])
    assert result.exit_code == 0, result.output
    assert "int4 with a scale (fp16) for each group of 32 inputs" in " ".join(result.output.split())
    assert load_quantization(tmp_path / "small") == Quantization("int4", group_size=32)
    assert (tmp_path / "small" / "tokenizer.json").is_file()
    assert all(not weight.problems() for _, weight in quantized_weights(load_model(tmp_path / "small")))


@pytest.mark.parametrize(
    "options",
    [("--weights", "int3"), ("--group-size", "48"), ("--weights", "int8", "--minimums"), ("--max-shard-size", "big")],
)
def test_the_command_refuses_what_it_cannot_do(tmp_path: Path, options: tuple[str, ...]) -> None:
    folder = write_tiny_model(tmp_path / "whole")
    assert CliRunner().invoke(app, ["quantize", str(folder), str(tmp_path / "small"), *options]).exit_code == 2
    assert not (tmp_path / "small").exists()


def test_a_folder_that_is_in_the_way_is_kept(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "whole")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine.txt").write_text("mine")
    result = CliRunner().invoke(app, ["quantize", str(folder), str(tmp_path / "small")])
    assert result.exit_code == 1
    assert (tmp_path / "small" / "mine.txt").read_text() == "mine"


def test_weights_that_cannot_be_rounded_leave_no_folder(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "whole", replace(llama_config(), tie_word_embeddings=False))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = 1e7
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(QuantizationError, match="too large for scales in fp16"):
        quantize_folder(folder, tmp_path / "small", kind="int4")
    assert not (tmp_path / "small").exists()


def test_evaluation_reads_the_model_in_fewer_bits_as_it_is_served() -> None:
    model, window = tiny_model(), torch.tensor(random_text(700))
    compared = quantized_variants(model, ("int8", "int4", "bfloat16-state"))
    assert [variant.name for variant in compared] == [
        "ours, weights in int8",
        "ours, weights in int4",
        "ours, state in bfloat16",
    ]
    whole = score(Variant("ours", model, HybridAttention(), None), [window])
    for variant, limit in zip(compared, (0.02, 0.3, 0.02), strict=True):
        rounded = score(variant, [window])
        assert torch.equal(rounded.counts, whole.counts)
        assert (rounded.losses - whole.losses).abs().sum() < limit * whole.losses.sum()
        assert not torch.equal(rounded.losses, whole.losses)
    assert compared[2].state_bytes is not None
    assert compared[2].state_bytes < 0.6 * model.state_spec.bytes_per_slot
    assert model.quantization is None
