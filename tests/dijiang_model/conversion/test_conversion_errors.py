"""What goes wrong on the way from a teacher to a trained model: a sentence each, and nothing half-made that loads."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer import Typer
from typer.testing import CliRunner

from dijiang_model.conversion.cli import convert_command
from dijiang_model.conversion.convert import convert
from dijiang_model.conversion.evaluation.cli import evaluate_command
from dijiang_model.conversion.training.adapters import save_adapter
from dijiang_model.conversion.training.cli import train_command
from tests.byte_tokenizer import write_byte_tokenizer
from tests.dijiang_model.conversion.training.test_adapters import made_for
from tests.dijiang_model.conversion.training.test_train_kill import limited
from tests.dijiang_model.teachers import llama_teacher, save_teacher
from tests.tiny_models import HYBRID, llama_config, write_tiny_model

app = Typer()
app.command("convert")(convert_command)
app.command("train")(train_command)
app.command("evaluate")(evaluate_command)


def refused(*arguments: object) -> str:
    """The one sentence of a command that fails."""
    command = [str(argument) for argument in arguments]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "400", "NO_COLOR": "1"})
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    sentence: str = result.output[result.output.index("error:") :]
    return sentence


def sharded(folder: Path) -> Path:
    return save_teacher(llama_teacher(), folder, max_shard_size="60KB")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def other_index(path: Path) -> None:
    index = path.parent / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["model.norm.weight"] = "model-00009-of-00009.safetensors"
    index.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_short, "is not a readable safetensors file"),
        (lambda path: path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:]), "is not a readable safetensors file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.unlink(), "does not exist"),
        (other_index, "model-00009-of-00009.safetensors does not exist"),
    ],
    ids=["cut short", "header overwritten", "empty", "missing", "index of another"],
)
def test_a_corrupt_shard_is_named_and_nothing_is_written(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    source = sharded(tmp_path / "hf")
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 2
    damage(shards[1])
    sentence = refused("convert", source, tmp_path / "out")
    assert words in sentence
    assert shards[1].name in sentence or "00009" in sentence
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_a_corrupt_bin_shard_is_named_too(tmp_path: Path, is_zip: bool) -> None:
    source = save_teacher(llama_teacher(), tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    weight_map = {name: f"pytorch_model-{index % 2}.bin" for index, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        torch.save(part, source / shard, _use_new_zipfile_serialization=is_zip)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    cut_short(source / "pytorch_model-1.bin")
    assert "pytorch_model-1.bin is not a readable PyTorch file" in refused("convert", source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
@pytest.mark.slow
def test_a_disk_that_fills_up_ends_a_conversion_with_a_sentence(tmp_path: Path) -> None:
    source = sharded(tmp_path / "hf")
    status, output = limited(100_000, "convert", source, tmp_path / "out")
    assert (status, "Traceback" in output) == (1, False), output
    assert "cannotbewritten" in "".join(output.split())
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_a_tokenizer_that_does_not_fit_is_told_before_training(tmp_path: Path) -> None:
    """A model of 100 tokens with a tokenizer of 260: put there by hand, as conversion refuses it."""
    source = tmp_path / "hf"
    llama_teacher(vocab_size=100, bos_token_id=1, eos_token_id=2).save_pretrained(source)
    write_byte_tokenizer(source)
    assert "the model's vocabulary only 100 tokens" in refused("convert", source, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).rename(tmp_path / name)
    convert(source, tmp_path / "model", window=5)
    (tmp_path / "tokenizer.json").rename(tmp_path / "model" / "tokenizer.json")
    text = tmp_path / "text.txt"
    text.write_text("some text " * 100)
    run = ("--data", text, "--out", tmp_path / "run", "--sequence-length", 64)
    assert "the model has 100 tokens" in refused("train", tmp_path / "model", *run)
    assert not (tmp_path / "run").exists()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert "is not a readable tokenizer" in refused("train", tmp_path / "model", *run)


def test_text_of_another_encoding_is_told_by_every_command_that_reads_text(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", llama_config(HYBRID, HYBRID))
    text = tmp_path / "latin.txt"
    text.write_bytes("naïve ".encode("latin-1") * 1000)
    assert "latin.txt is not UTF-8: byte 2" in refused("train", model, "--data", text, "--out", tmp_path / "run")
    assert "latin.txt is not UTF-8: byte 2" in refused(
        "evaluate", model, "--teacher", model, "--text", text, "--out", tmp_path / "report"
    )
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "report").exists()


def test_an_adapter_of_another_base_is_told_by_every_command_that_takes_one(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", llama_config(HYBRID, HYBRID))
    other = write_tiny_model(tmp_path / "other", llama_config(HYBRID, HYBRID), seed=1)
    adapter = tmp_path / "adapter.safetensors"
    save_adapter(made_for(other), adapter)
    text = tmp_path / "text.txt"
    text.write_text("some text " * 1000)
    words = "this model is another one"
    assert words in refused("train", model, "--data", text, "--out", tmp_path / "run", "--start", adapter)
    read = ("--teacher", model, "--text", text, "--out", tmp_path / "report")
    assert words in refused("evaluate", model, *read, "--adapter", adapter)
    assert words in refused("evaluate", model, *read, "--control", adapter)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "report").exists()
