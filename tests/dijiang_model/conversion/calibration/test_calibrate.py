"""Any family converts to a byte budget and is served; what was found divides other budgets as well."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.checkpoints.config_json import read_stored_config
from dijiang_model.checkpoints.outputs import CALIBRATION_FILE
from dijiang_model.conversion.calibration.calibrate import Calibration
from dijiang_model.conversion.convert import convert
from dijiang_model.conversion.merge import merge
from dijiang_model.conversion.recipes import Recipe
from dijiang_model.conversion.training.adapters import kernel_adapter, save_adapter
from dijiang_model.errors import ConversionError
from dijiang_model.native.library import load_library
from dijiang_model.serving.network import freeze
from tests.dijiang_model.checkpoints.published_configs import save as save_published
from tests.dijiang_model.checkpoints.published_configs import tiny_teacher
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, logits_of, random_text
from tests.dijiang_model.teachers import gpt_neox_teacher, llama_teacher, opt_teacher, save_teacher

TEACHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama_teacher,
    "gpt_neox": gpt_neox_teacher,
    "opt": opt_teacher,
    "opt 350m": lambda: opt_teacher(do_layer_norm_before=False, word_embed_proj_dim=24),
}
BUDGET = 40_000


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "rain.txt"
    file.write_text("It rained all day. Nobody went out. The cat slept on the stove. " * 60)
    return file


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("models")
    source = save_teacher(llama_teacher(), folder / "teacher")
    convert(source, folder / "model", state_bytes=BUDGET, calibration_text=[text])
    return folder / "model"


@pytest.mark.parametrize("name", TEACHERS)
def test_every_family_converts_within_its_budget_and_answers(name: str, tmp_path: Path, text: Path) -> None:
    source = save_teacher(TEACHERS[name](), tmp_path / "teacher")
    layers: list[tuple[int, int]] = []
    made = convert(
        source,
        tmp_path / "model",
        state_bytes=BUDGET,
        calibration_text=[text],
        on_layer=lambda done, total: layers.append((done, total)),
    )
    assert layers == [(done, 4) for done in (1, 2, 3, 4)]
    model = load_model(tmp_path / "model")
    assert made.state_bytes == model.state_spec.bytes_per_slot <= BUDGET
    assert "places a head" in made.memory
    assert bool(logits_of(model, random_text(100)).isfinite().all())
    assert "## What a state holds" in (tmp_path / "model" / "README.md").read_text()


def test_a_state_that_holds_all_tokens_is_the_teacher(tmp_path: Path, text: Path) -> None:
    teacher = llama_teacher()
    source = save_teacher(teacher, tmp_path / "teacher")
    convert(source, tmp_path / "model", state_bytes=400_000, calibration_text=[text])
    tokens = random_text(100)
    with torch.no_grad():
        expected = teacher(torch.tensor([tokens])).logits[0]
    found = logits_of(load_model(tmp_path / "model"), tokens)
    # Keys and values are rounded to 8 bits.
    assert float((found - expected).norm() / expected.norm()) < 0.03


def test_what_was_found_stays_with_the_model_and_divides_other_budgets(converted: Path) -> None:
    calibration = Calibration.read(converted)
    assert calibration is not None
    config = read_stored_config(converted).config
    assert calibration.config(config) == config
    smaller = calibration.config(config, state_bytes=BUDGET // 2)
    places = [sum(sum(layer.anchors.places) for layer in each.layers if layer.anchors) for each in (smaller, config)]
    assert places[0] < places[1]
    (converted / CALIBRATION_FILE).with_name("other").mkdir()
    assert Calibration.read(converted / "other") is None


def test_an_adapter_spares_others_the_calibration(converted: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.safetensors"
    save_adapter(kernel_adapter(converted, recipe="calibrated"), adapter)
    convert(converted.parent / "teacher", tmp_path / "plain")
    merge(tmp_path / "plain", adapter, tmp_path / "merged")
    assert read_stored_config(tmp_path / "merged").config == read_stored_config(converted).config
    assert (tmp_path / "merged" / CALIBRATION_FILE).read_text() == (converted / CALIBRATION_FILE).read_text()
    assert "## What a state holds" in (tmp_path / "merged" / "README.md").read_text()
    tokens = random_text(100)
    models = (load_model(folder) for folder in (converted, tmp_path / "merged"))
    assert torch.equal(*(logits_of(model, tokens) for model in models))


def test_a_damaged_calibration_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / CALIBRATION_FILE).write_text("{}")
    with pytest.raises(ConversionError, match=r"calibration\.json is damaged"):
        Calibration.read(tmp_path)


def test_a_model_without_a_tokenizer_is_calibrated_on_random_tokens(tmp_path: Path) -> None:
    llama_teacher().save_pretrained(tmp_path / "teacher")
    made = convert(tmp_path / "teacher", tmp_path / "model", state_bytes=BUDGET)
    assert made.state_bytes <= BUDGET
    assert "No facts were asked for" in (tmp_path / "model" / "README.md").read_text()


def test_budgets_are_for_hybrids_and_large_enough(tmp_path: Path) -> None:
    source = save_teacher(llama_teacher(), tmp_path / "teacher")
    with pytest.raises(ConversionError, match="a budget of bytes is for the recipe hybrid, not for pure"):
        convert(source, tmp_path / "model", recipe=Recipe.PURE, state_bytes=BUDGET)
    with pytest.raises(ConversionError, match="a state of 1,000 bytes is too small for this model"):
        convert(source, tmp_path / "model", state_bytes=1000)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "mistral", "sliding_window": 64}))
    with pytest.raises(ConversionError, match="the teacher sees the last 64 tokens alone"):
        convert(source, tmp_path / "model", state_bytes=BUDGET // 2)
    assert not (tmp_path / "model").exists()


def test_layers_that_slide_keep_their_window_and_the_others_share_the_budget(tmp_path: Path, text: Path) -> None:
    teacher = tiny_teacher("gemma-3-1b")
    source, budget = save_published(teacher, tmp_path / "hf"), 1_400_000
    made = convert(source, tmp_path / "out", state_bytes=budget, calibration_text=[text])
    model = load_model(tmp_path / "out")
    local, everywhere = model.config.layers
    assert (local.window, local.sinks, local.anchors) == (32, 0, None)
    assert everywhere.anchors is not None
    assert made.state_bytes == model.state_spec.bytes_per_slot <= budget
    assert budget - made.state_bytes < 4096
    assert "| 1 |" in (tmp_path / "out" / "README.md").read_text()
    ids = random_text(60)  # all of it has a place
    with torch.no_grad():
        expected = teacher(torch.tensor([ids])).logits[0]
    # Places hold keys and values in 8 bits, the window of the other layer does not.
    assert_close_in_norm(logits_of(model, ids), expected, tolerance=0.02)
    frozen = freeze(model)
    assert load_library() is None or frozen.decode_path == "native"
    found = Stepper(frozen).open(1).step({1: ids})[1]
    assert_close_in_norm(found, expected, tolerance=0.02)
    with pytest.raises(ConversionError, match="beside layers that keep the window that the teacher has there"):
        convert(source, tmp_path / "small", state_bytes=20_000, calibration_text=[text])


@pytest.mark.parametrize("name", ["mistral-7b-v0.1", "phi-3-mini-4k"])
def test_a_teacher_that_slides_everywhere_is_kept_whole_or_refused(name: str, tmp_path: Path) -> None:
    teacher = tiny_teacher(name)
    source = save_published(teacher, tmp_path / "hf")
    made = convert(source, tmp_path / "out", state_bytes=2**20)
    model, ids = load_model(tmp_path / "out"), random_text(70)
    assert {(layer.window, layer.sinks, layer.anchors) for layer in model.config.layers} == {(32, 0, None)}
    with torch.no_grad():
        assert_close_in_norm(logits_of(model, ids), teacher(torch.tensor([ids])).logits[0], tolerance=1e-5)
    with pytest.raises(ConversionError, match=rf"give --state-bytes {made.state_bytes} or more, or a shorter --window"):
        convert(source, tmp_path / "small", state_bytes=made.state_bytes - 1)
