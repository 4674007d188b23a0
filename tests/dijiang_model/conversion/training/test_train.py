"""Training: it learns, repeats bit for bit, survives kills, and refuses what it cannot do."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer import Typer
from typer.testing import CliRunner

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.config import FeatureConfig, ModelConfig
from dijiang_model.conversion.convert import convert
from dijiang_model.conversion.training.adapters import ADAPTER_FILE, adapted_model, load_adapter
from dijiang_model.conversion.training.cli import train_command
from dijiang_model.conversion.training.kernel_training import kernel_tensors
from dijiang_model.conversion.training.log import LOG_FILE, read_log
from dijiang_model.conversion.training.setup import StudentOptions, prepare_run
from dijiang_model.conversion.training.text_mixture import load_mixture, parse_source
from dijiang_model.conversion.training.text_windows import TokenWindows, load_tokenizer, load_windows
from dijiang_model.conversion.training.train import Trainer, TrainingOptions, train
from dijiang_model.errors import CheckpointError, ConversionError
from tests.dijiang_model.stepping import logits_of, random_text
from tests.dijiang_model.teachers import llama_teacher, save_teacher
from tests.tiny_models import (
    BYTE_VOCAB_SIZE,
    HYBRID,
    PURE,
    RELEASED,
    gemma3_config,
    llama_config,
    olmo2_config,
    qwen2_config,
    qwen3_config,
    write_tiny_model,
)

STUDENT = StudentOptions(FeatureConfig(bases=("dct2", "dct4"), nodes="signed_sphere", far_rank=2), windows="keep")


def options(**changed: object) -> TrainingOptions:
    values: dict[str, object] = {
        "tokens": 1280, "minutes": None, "stages": (1, 2), "stage_one_share": 0.5, "sequence_length": 128,
        "batch_size": 1, "learning_rate": 1e-3, "lora_rank": 2, "precision": "fp32", "linear": True,
        "seed": 3,
    }  # fmt: skip
    return TrainingOptions(**(values | changed))  # type: ignore[arg-type]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", llama_config(HYBRID, HYBRID))


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {n} of a text about {n % 7} things.\n" for n in range(400)))
    return str(path)


def prepared(model: Path, text: str, out: Path, *, resume: bool = False, **changed: object) -> Trainer:
    return prepare_run(model, [text], out, options(**changed), STUDENT, resume=resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / ADAPTER_FILE)


def test_the_layers_learn_their_attention(model: Path, text: str, tmp_path: Path) -> None:
    trainer = prepared(model, text, tmp_path / "run", tokens=128 * 40, stages=(1,), learning_rate=3e-3)
    assert train(trainer, tmp_path / "run")
    losses = [line["loss"] for line in read_log(tmp_path / "run" / LOG_FILE)]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_the_logits_come_nearer_to_the_teachers(model: Path, text: str, tmp_path: Path) -> None:
    trainer = prepared(model, text, tmp_path / "run", tokens=128 * 40, stages=(2,), learning_rate=3e-3)
    assert train(trainer, tmp_path / "run")
    losses = [line["loss"] for line in read_log(tmp_path / "run" / LOG_FILE)]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_products_in_bf16_lead_the_same_way(model: Path, text: str, tmp_path: Path) -> None:
    gradients = []
    for precision in ("fp32", "bf16"):
        trainer = prepared(model, text, tmp_path / precision, stages=(2,), precision=precision)
        trainer.step()
        gradients.append(
            torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad and p.grad is not None])
        )
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert not torch.equal(*gradients)
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.98


def test_a_control_trains_the_window_alone(model: Path, text: str, tmp_path: Path) -> None:
    for name, is_linear in (("control", False), ("hybrid", True)):
        trainer = prepared(model, text, tmp_path / name, tokens=128 * 6, stages=(2,), linear=is_linear)
        before = kernel_tensors(trainer.model)
        assert train(trainer, tmp_path / name)
        after = kernel_tensors(trainer.model)
        assert all(torch.equal(before[key], after[key]) for key in before) != is_linear
        silent = [torch.isneginf(value).all() for key, value in after.items() if key.endswith("mix_bias")]
        assert all(silent) != is_linear
    ours, control = (weights(tmp_path / name) for name in ("hybrid", "control"))
    assert any(key.endswith("lora_up") and bool(control[key].any()) for key in ours)


def test_windows_can_be_given_in_tokens(model: Path, text: str, tmp_path: Path) -> None:
    student = replace(STUDENT, windows=9)
    trainer = prepare_run(model, [text], tmp_path / "run", options(), student)
    assert [layer.window for layer in trainer.model.config.layers] == [9, 9]


def test_a_run_repeats_bit_for_bit(model: Path, text: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(prepared(model, text, tmp_path / name), tmp_path / name)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("killed_after", [1, 4, 5, 6, 9])
def test_a_killed_run_resumes_as_if_nothing_happened(model: Path, text: str, tmp_path: Path, killed_after: int) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    train(prepared(model, text, undisturbed), undisturbed)

    trainer = prepared(model, text, killed)
    assert not train(trainer, killed, should_stop=lambda: trainer.progress.step == killed_after)
    trainer.step()  # work after the last checkpoint that the kill loses
    log = (killed / LOG_FILE).read_text()
    (killed / LOG_FILE).write_text(log + json.dumps({"step": killed_after + 1}) + '\n{"half a li')
    assert train(prepared(model, text, killed, resume=True), killed)

    expected, found = weights(undisturbed), weights(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [line["step"] for line in read_log(killed / LOG_FILE)] == list(range(1, 11))


@pytest.mark.parametrize("layers_done", [0, 1, 2])
def test_a_killed_replay_resumes_as_if_nothing_happened(
    model: Path, text: str, tmp_path: Path, layers_done: int
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert prepared(model, text, undisturbed, stages=(1,), tokens=512).replay(undisturbed, epochs=3)
    trainer = prepared(model, text, killed, stages=(1,), tokens=512)
    trainer.save(killed)
    trainer.replay(killed, epochs=3, should_stop=lambda: trainer.progress.step == layers_done)
    assert prepared(model, text, killed, stages=(1,), tokens=512, resume=True).replay(killed, epochs=3)
    expected, found = weights(undisturbed), weights(killed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    losses = [(line["first_epoch"], line["loss"]) for line in read_log(killed / LOG_FILE)]
    assert len(losses) == 2
    assert all(last < first for first, last in losses)


def test_other_options_cannot_resume(model: Path, text: str, tmp_path: Path) -> None:
    trainer = prepared(model, text, tmp_path / "run")
    train(trainer, tmp_path / "run", should_stop=lambda: True)
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.001, is 0\.01"):
        prepared(model, text, tmp_path / "run", resume=True, learning_rate=0.01)


def test_there_must_be_something_to_resume(model: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="adapter"):
        prepared(model, text, tmp_path / "nothing", resume=True)


def test_a_run_that_starts_from_an_adapter_goes_on_from_it(model: Path, text: str, tmp_path: Path) -> None:
    train(prepared(model, text, tmp_path / "one"), tmp_path / "one")
    start = tmp_path / "one" / ADAPTER_FILE
    trainer = prepare_run(model, [text], tmp_path / "two", options(stages=(2,)), STUDENT, start=start)
    tensors = trainer.adapter().tensors
    assert all(torch.allclose(tensors[name], value, rtol=1e-6) for name, value in weights(tmp_path / "one").items())
    trainer.step()
    assert trainer.adapter().info.tokens_trained == 1280 + 128


def test_pure_models_train(tmp_path: Path, text: str) -> None:
    folder = write_tiny_model(tmp_path / "pure", llama_config(PURE, PURE))
    assert train(prepared(folder, text, tmp_path / "run", tokens=512), tmp_path / "run")


def test_the_released_read_out_is_refused(tmp_path: Path, text: str) -> None:
    folder = write_tiny_model(tmp_path / "released", llama_config(RELEASED, RELEASED, num_heads=4, num_kv_heads=4))
    with pytest.raises(ConversionError, match="group_norm"):
        prepared(folder, text, tmp_path / "run")


def test_text_of_another_encoding_is_an_error(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Übergrößenträger".encode("latin-1"))
    with pytest.raises(ConversionError, match="not UTF-8: byte 0"):
        prepared(model, str(path), tmp_path / "run")


def test_too_little_text_is_an_error(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("short")
    with pytest.raises(ConversionError, match="no file of text has 128 tokens"):
        prepared(model, str(path), tmp_path / "run")


def test_a_tokenizer_that_does_not_fit_is_an_error(model: Path, text: str) -> None:
    with pytest.raises(ConversionError, match="the model has 50 tokens"):
        load_windows([Path(text)], load_tokenizer(model), length=64, seed=0, vocab_size=50)


def test_every_window_comes_once_an_epoch() -> None:
    windows = TokenWindows(np.arange(12, dtype=np.int32).reshape(6, 2), seed=5)
    seen = torch.cat([windows.batch(step, 2)[:, 0] for step in range(6)]).tolist()
    first, second = seen[:6], seen[6:]
    assert sorted(first) == sorted(second) == [0, 2, 4, 6, 8, 10]
    assert first != second


def test_texts_take_turns_by_weight(model: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 640)
    sources = [parse_source(f"{tmp_path / 'a.txt'}=3"), parse_source(f"{tmp_path / 'b.txt'}=1")]
    mixture = load_mixture(sources, load_tokenizer(model), length=64, seed=0, vocab_size=BYTE_VOCAB_SIZE)
    picked = [int(mixture.batch(step, 1)[0, 0]) for step in range(200)]
    assert 145 <= picked.count(ord("a")) <= 155


def test_the_teacher_writes_chat_and_trains_on_it(model: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = prepare_run(model, [text], out, options(tokens=256), STUDENT, self_distill=20)
    assert "<|im_start|>assistant" in (out / "answers.txt").read_text()
    assert train(trainer, out)
    assert load_model(model).config.layers[0] == HYBRID


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("texts.txt.gz", "is compressed; unpack it first"),
        ("book.pdf", "is a document; extract its text first"),
        ("model.safetensors", "is a file of tensors"),
        ("empty.txt", "is empty"),
    ],
)
def test_data_that_is_not_text_is_named(model: Path, tmp_path: Path, name: str, words: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_bytes(b"" if name == "empty.txt" else b'{"text": "a"}\n' * 100)
    with pytest.raises(ConversionError, match=words):
        prepared(model, str(folder / name), tmp_path / "run")
    if name != "empty.txt":
        with pytest.raises(ConversionError, match=words):
            prepared(model, str(folder), tmp_path / "run")


@pytest.mark.parametrize(
    "config",
    [qwen2_config(HYBRID, HYBRID), qwen3_config(HYBRID, HYBRID), gemma3_config(), olmo2_config(HYBRID, HYBRID)],
    ids=["qwen2", "qwen3", "gemma3", "olmo2"],
)
def test_other_families_train_in_both_stages(config: ModelConfig, text: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", config)
    trainer = prepared(model, text, tmp_path / "run", tokens=512)
    assert train(trainer, tmp_path / "run")
    assert {name.rsplit(".", 2)[-2] for name in weights(tmp_path / "run") if name.endswith("lora_up")} == {"weight"}
    losses = [line["loss"] for line in read_log(tmp_path / "run" / LOG_FILE)]
    for layer in range(config.num_layers):  # what sees all that its teacher sees has nothing to learn
        bias = weights(tmp_path / "run")[f"model.layers.{layer}.self_attn.linear.mix_bias"]
        assert bool(bias.isneginf().all()) == config.is_local(layer)
    assert len(losses) == 4
    assert np.isfinite(losses).all()


def test_a_run_that_is_done_says_so(model: Path, text: str, tmp_path: Path) -> None:
    app = Typer()
    app.command()(train_command)
    command = [
        str(model),
        "--data",
        text,
        "--out",
        str(tmp_path / "run"),
        "--tokens",
        "256",
        "--sequence-length",
        "128",
    ]
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    assert CliRunner().invoke(app, command, env=environment).exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.suffix != ".png"}
    result = CliRunner().invoke(app, [*command, "--resume"], env=environment)
    assert result.exit_code == 0
    assert "The run is done already: 256 tokens" in result.output
    assert "nan" not in result.output
    assert all((tmp_path / "run" / name).read_bytes() == content for name, content in before.items())


def test_an_anchored_model_trains_from_what_calibration_fitted_and_keeps_its_bytes(tmp_path: Path, text: str) -> None:
    source = save_teacher(llama_teacher(max_position_embeddings=512), tmp_path / "teacher")
    rain = tmp_path / "rain.txt"
    rain.write_text("It rained all day. Nobody went out. The cat slept on the stove. " * 150)
    convert(source, tmp_path / "model", state_bytes=40_000, calibration_text=[rain])
    fitted, run = load_model(tmp_path / "model"), tmp_path / "run"
    trainer = prepared(tmp_path / "model", text, run, tokens=1280)
    start, before = trainer.adapter(), fitted.state_dict()
    assert start.config(fitted.config) == fitted.config
    kernels = {name: value for name, value in start.tensors.items() if ".linear." in name}
    assert all(torch.allclose(value, before[name], rtol=1e-5) for name, value in kernels.items())
    assert not train(trainer, run, should_stop=lambda: trainer.progress.step == 4)
    assert train(prepared(tmp_path / "model", text, run, tokens=1280, resume=True), run)
    trained = adapted_model(fitted, load_adapter(run))
    assert trained.state_spec == fitted.state_spec
    assert bool(logits_of(trained, random_text(100)).isfinite().all())
