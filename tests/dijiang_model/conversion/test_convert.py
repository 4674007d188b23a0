"""Conversion: a hybrid whose window is longer than the text is its teacher; nothing half-made can be loaded."""

import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.checkpoints.config_json import read_stored_config
from dijiang_model.conversion import convert as convert_module
from dijiang_model.conversion.convert import convert
from dijiang_model.conversion.model_card import UNTRAINED_WARNING
from dijiang_model.conversion.recipes import Recipe
from dijiang_model.errors import ConfigError, ConversionError, ModelError
from dijiang_model.formats.tensor_files import open_tensors
from tests.dijiang_model.checkpoints.golden_checkpoints import FOLDER
from tests.dijiang_model.stepping import logits_of, random_text
from tests.dijiang_model.teachers import gpt_neox_teacher, llama_teacher, opt_teacher, save_teacher
from tests.tiny_models import write_tiny_model

TEXT = random_text(40)
TOLERANCE = 1e-4
"""Of the logits' norm, both sides in fp32."""

TEACHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama_teacher,
    "llama untied with biases": lambda: llama_teacher(
        tie_word_embeddings=False, attention_bias=True, mlp_bias=True, num_key_value_heads=1, head_dim=32
    ),
    "gpt_neox": gpt_neox_teacher,
    "opt": opt_teacher,
    "opt 350m": lambda: opt_teacher(do_layer_norm_before=False, word_embed_proj_dim=24),
    "gpt_neox sequential": lambda: gpt_neox_teacher(use_parallel_residual=False, tie_word_embeddings=True),
}


def teacher_logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([TEXT])).logits[0]
    return logits


def difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_teacher(llama_teacher(), tmp_path / "teacher")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_hybrid_with_a_window_over_the_whole_text_is_its_teacher(tmp_path: Path, kind: str) -> None:
    teacher = TEACHERS[kind]()
    save_teacher(teacher, tmp_path / "teacher")
    convert(tmp_path / "teacher", tmp_path / "out", window=60, sinks=4)
    model = load_model(tmp_path / "out")
    assert difference(logits_of(model, TEXT), teacher_logits(teacher)) < TOLERANCE


def test_a_shorter_window_computes_something_else(tmp_path: Path) -> None:
    teacher = llama_teacher()
    save_teacher(teacher, tmp_path / "teacher")
    convert(tmp_path / "teacher", tmp_path / "out", window=5, sinks=1)
    assert difference(logits_of(load_model(tmp_path / "out"), TEXT), teacher_logits(teacher)) > 100 * TOLERANCE


@pytest.mark.parametrize("form", ["sharded safetensors", "bin", "sharded bin"])
def test_every_form_of_an_hf_folder_gives_the_same_model(source: Path, tmp_path: Path, form: str) -> None:
    convert(source, tmp_path / "expected")
    other = tmp_path / "other"
    tensors = load_file(source / "model.safetensors")
    if form == "sharded safetensors":
        save_teacher(llama_teacher(), other, max_shard_size="50KB")
        assert len(list(other.glob("*.safetensors"))) > 2
    else:
        shutil.copytree(source, other)
        (other / "model.safetensors").unlink()
        _write_bin(other, tensors, num_shards=1 if form == "bin" else 3)
    convert(other, tmp_path / "out")
    expected, actual = load_model(tmp_path / "expected").state_dict(), load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def _write_bin(folder: Path, tensors: dict[str, Tensor], *, num_shards: int) -> None:
    if num_shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    weight_map = {name: f"pytorch_model-{i % num_shards}.bin" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        torch.save({name: tensors[name] for name, owner in weight_map.items() if owner == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_opt_weights_without_the_outer_prefix_are_found(tmp_path: Path) -> None:
    source = save_teacher(opt_teacher(), tmp_path / "teacher")
    convert(source, tmp_path / "expected")
    tensors = {name.removeprefix("model."): value for name, value in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "out")
    expected, actual = load_model(tmp_path / "expected").state_dict(), load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("recipe", Recipe)
def test_every_recipe_gives_a_model_that_loads_and_says_what_it_is(
    source: Path, tmp_path: Path, recipe: Recipe
) -> None:
    made = convert(source, tmp_path / "out", recipe=recipe)
    model = load_model(tmp_path / "out")
    assert logits_of(model, TEXT).isfinite().all()
    assert made.state_bytes == model.state_spec.bytes_per_slot
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{made.state_bytes:,} bytes per conversation" in card
    assert (UNTRAINED_WARNING in card) == (UNTRAINED_WARNING in made.warnings) == (recipe != Recipe.HYBRID)
    assert read_stored_config(tmp_path / "out").origin.recipe == recipe


def test_the_hybrid_starts_silent_with_the_recorded_nodes_and_decays(source: Path, tmp_path: Path) -> None:
    made = convert(source, tmp_path / "out", window=12, sinks=3)
    assert made.title == "DiJiang hybrid, window 12+3"
    assert made.title in (tmp_path / "out" / "README.md").read_text()
    state = load_model(tmp_path / "out").state_dict()
    prefix = "model.layers.1.self_attn.linear."
    assert torch.all(state[f"{prefix}mix_bias"] == -math.inf)
    assert not state[f"{prefix}mix_weight"].any()
    assert not state[f"{prefix}log_weights"].any()
    half_lives = -math.log(2) / state[f"{prefix}log_decay"]
    assert torch.allclose(half_lives, torch.tensor([15.0, 900.0]))
    layer = read_stored_config(tmp_path / "out").config.layers[0]
    assert layer.features.scale == pytest.approx(16**-0.25)
    assert (layer.window, layer.sinks) == (12, 3)


def test_the_released_recipe_starts_as_the_authors_do_and_reproducibly(tmp_path: Path) -> None:
    save_teacher(gpt_neox_teacher(), tmp_path / "teacher")
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        convert(tmp_path / "teacher", tmp_path / name, recipe=Recipe.RELEASED, seed=seed)
    a, b, c = (load_model(tmp_path / name).state_dict() for name in "abc")
    gate = "gpt_neox.layers.0.attention.gate.weight"
    assert torch.equal(a[gate], b[gate])
    assert not torch.equal(a[gate], c[gate])
    assert not torch.equal(a[gate], a[gate.replace("layers.0", "layers.1")])
    gamma = a["gpt_neox.layers.0.attention.linear.log_decay"].exp()
    assert torch.allclose(gamma, 1 - torch.linspace(math.log(1 / 32), math.log(1 / 512), 3).exp())
    assert torch.all(a["gpt_neox.layers.0.attention.group_norm.weight"] == 1)
    assert read_stored_config(tmp_path / "a").origin.seed == 7


@pytest.mark.parametrize("name", ["aligned", "straddling", "sign_flips"])
def test_a_released_checkpoint_is_saved_anew_unchanged(tmp_path: Path, name: str) -> None:
    made = convert(FOLDER / name, tmp_path / "out")
    expected, actual = load_model(FOLDER / name), load_model(tmp_path / "out")
    assert actual.config == expected.config
    assert all(torch.equal(actual.state_dict()[key], value) for key, value in expected.state_dict().items())
    assert made.title == "DiJiang"
    assert any("no tokenizer" in warning for warning in made.warnings)


def test_our_own_format_is_saved_anew_in_another_dtype(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out", dtype="bfloat16", max_shard_bytes=50_000)
    expected = load_model(tmp_path / "model", dtype=torch.bfloat16).state_dict()
    actual = load_model(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_a_recipe_for_a_dijiang_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="DiJiang model already"):
        convert(FOLDER / "aligned", tmp_path / "out", recipe=Recipe.HYBRID)


def test_the_stored_dtype_is_the_sources_unless_another_is_asked_for(tmp_path: Path) -> None:
    save_teacher(llama_teacher().to(torch.bfloat16), tmp_path / "teacher")
    for dtype, expected in ((None, torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)):
        convert(tmp_path / "teacher", tmp_path / "out", dtype=dtype, overwrite=True)
        stored = open_tensors(tmp_path / "out").infos()
        assert stored["model.norm.weight"].dtype == expected
        assert stored["model.layers.0.self_attn.linear.nodes"].dtype == torch.float32


def test_end_of_sequence_ids_come_from_the_generation_config(source: Path, tmp_path: Path) -> None:
    edit_json(source / "generation_config.json", eos_token_id=[258, 256])
    convert(source, tmp_path / "out")
    assert load_model(tmp_path / "out").config.eos_token_ids == (258, 256)
    edit_json(source / "generation_config.json", eos_token_id=[258, 260])
    with pytest.raises(ConversionError, match="eos_token_id"):
        convert(source, tmp_path / "other")


def test_the_tokenizer_is_copied_verbatim(source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "out").has_tokenizer
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    save_teacher(llama_teacher(vocab_size=259), tmp_path / "teacher")
    with pytest.raises(ConversionError, match="ids up to 259, the model's vocabulary only 259"):
        convert(tmp_path / "teacher", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_names_teacher_and_licence_and_forges_nothing(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Teacher\n")
    edit_json(source / "config.json", _name_or_path="someone/tiny")
    convert(source, tmp_path / "out")
    origin = read_stored_config(tmp_path / "out").origin
    assert (origin.teacher, origin.licence) == ("someone/tiny", "apache-2.0")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "someone/tiny" in card
    assert 'license: "apache-2.0"' in card
    assert "Nothing was trained" in card


def test_a_folder_of_the_hub_cache_is_named_after_its_repository(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "0123abcd"
    shutil.copytree(source, snapshot)
    convert(snapshot, tmp_path / "out")
    assert read_stored_config(tmp_path / "out").origin.teacher == "someone/tiny"


def test_a_path_in_the_source_config_is_not_taken_for_a_name(source: Path, tmp_path: Path) -> None:
    edit_json(source / "config.json", _name_or_path="/home/somebody/secret")
    convert(source, tmp_path / "out")
    assert read_stored_config(tmp_path / "out").origin.teacher == "teacher"


@pytest.mark.parametrize("fail_at", [1, 10, 20])
def test_a_conversion_that_dies_midway_leaves_nothing_that_loads(source: Path, tmp_path: Path, fail_at: int) -> None:
    calls = 0

    def die(written: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", on_progress=die)
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"teacher"}


def test_progress_ends_at_the_total(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert(source, tmp_path / "out", on_progress=lambda written, total: seen.append((written, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_tensors_are_streamed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    counts: list[int] = []
    real = convert_module.has_valid

    def watch(name: str, tensor: Tensor) -> bool:
        counts.append(len(alive))
        alive.add(tensor)
        return real(name, tensor)

    monkeypatch.setattr(convert_module, "has_valid", watch)
    convert(source, tmp_path / "out", dtype="bfloat16")
    assert len(counts) > 20
    assert max(counts) <= 1


def test_all_misfits_of_the_source_are_listed(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.extra"] = torch.zeros(1)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError) as caught:
        convert(source, tmp_path / "out")
    for part in (
        "model.norm.weight [64] is missing",
        "model.extra [1] is surplus",
        "up_proj.weight has the shape [2, 2]",
    ):
        assert part in str(caught.value)


def test_values_that_are_not_finite_end_the_conversion(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"model\.norm\.weight"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unsupported_sources_are_clear_errors(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="does not exist; a source is a model folder or"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConversionError, match="window 0"):
        convert(source, tmp_path / "out", window=0)
    edit_json(source / "config.json", model_type="mamba")
    with pytest.raises(ConfigError, match="mamba"):
        convert(source, tmp_path / "out")
    (source / "config.json").unlink()
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        convert(source, tmp_path / "out")
