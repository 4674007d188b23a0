"""Folders and files that a conversion is given: other forms of weights, the hub's cache, likely slips."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.checkpoints.config_json import read_stored_config
from dijiang_model.conversion.convert import convert
from dijiang_model.conversion.quantize import quantize_folder
from dijiang_model.conversion.sources.find_source import find_source
from dijiang_model.conversion.training.adapters import load_adapter, save_adapter
from dijiang_model.errors import CheckpointError, ConfigError, ConversionError, ModelError
from dijiang_model.formats.stub_files import LFS_HEAD
from server.startup.assemble import find_model
from server.startup.errors import StartError
from server.startup.notices import Notices
from server.startup.settings import Settings
from tests.dijiang_model.conversion.test_own_models import TEXT, edit_json, edit_tensors
from tests.dijiang_model.conversion.training.test_adapters import made_for
from tests.dijiang_model.stepping import logits_of
from tests.dijiang_model.teachers import llama_teacher, write_gguf
from tests.tiny_models import HYBRID, llama_config, write_tiny_model

POINTER = LFS_HEAD + b"v1\noid sha256:0123\nsize 123456\n"


def test_a_stale_index_beside_a_whole_file_is_ignored(source: Path, tmp_path: Path) -> None:
    edit_json(
        source / "model.safetensors.index.json", weight_map={"model.norm.weight": "model-00001-of-00002.safetensors"}
    )
    convert(source, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", POINTER], ids=["empty", "pointer"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "model.gguf"]
)
def test_a_file_that_is_not_there_yet_is_named(source: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (source / name).write_bytes(content)
    words = "is empty" if content == b"" else r"is a Git LFS pointer, not the file; `git lfs pull`"
    with pytest.raises(ModelError, match=rf"{name} {words}"):
        convert(source / name if name == "model.gguf" else source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def as_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    for number, part in enumerate((names[:7], names[7:]), start=1):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number:05d}-of-00002.safetensors")


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: {change(name): t for name, t in tensors.items()})


FORMS: Mapping[str, Callable[[Path], None]] = {
    "shards without an index": as_shards,
    "torch.compile": renamed(lambda name: f"_orig_mod.{name}"),
    "compiled layers": renamed(lambda name: name.replace("model.layers.0.", "model.layers.0._orig_mod.")),
    "data parallel": renamed(lambda name: f"module.{name}"),
    "both": renamed(lambda name: f"module._orig_mod.{name}"),
    "the backbone alone": renamed(lambda name: name.removeprefix("model.")),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_other_forms_are_the_same_model(source: Path, tmp_path: Path, form: str) -> None:
    convert(source, tmp_path / "usual")
    FORMS[form](source)
    convert(source, tmp_path / "out")
    assert torch.equal(logits_of(load_model(tmp_path / "out"), TEXT), logits_of(load_model(tmp_path / "usual"), TEXT))


def test_missing_shards_are_counted(source: Path, tmp_path: Path) -> None:
    as_shards(source)
    (source / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="only 1 of 2 shards: model-00002"):
        convert(source, tmp_path / "out")


def test_a_gguf_is_found_without_its_suffix_and_alone_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    path = write_gguf(llama_teacher(), tmp_path / "hub" / "a.gguf")
    shutil.copy(path, tmp_path / "0123abcd")
    assert find_source(tmp_path / "hub") == path
    assert find_source(tmp_path / "0123abcd") == tmp_path / "0123abcd"
    convert(tmp_path / "0123abcd", tmp_path / "out")
    shutil.copy(path, tmp_path / "hub" / "b.gguf")
    with pytest.raises(ConversionError, match="holds 2 GGUF files; name one"):
        convert(tmp_path / "hub", tmp_path / "other")


def test_a_name_on_the_hub_is_taken_from_the_cache(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    with pytest.raises(ConversionError, match="`hf download some/model` fetches the model"):
        convert("some/model", tmp_path / "out")
    repository = cache / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(source, repository / "snapshots" / "abc")
    convert("some/model", tmp_path / "out")
    assert read_stored_config(tmp_path / "out").origin.teacher == "some/model"
    assert find_source(Path("https://huggingface.co/some/model/tree/main")) == repository / "snapshots" / "abc"
    with pytest.raises(ConversionError, match="did you mean some/model, which the hub's cache has"):
        convert("Model", tmp_path / "other")
    with pytest.raises(ConversionError, match=r"did you mean .*snapshots/abc\?"):
        convert(cache, tmp_path / "other")
    with pytest.raises(ConversionError, match=r"did you mean .*snapshots/abc\?"):
        convert(repository, tmp_path / "other")


def with_broken_link(folder: Path) -> Path:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("../../blobs/0123")
    return folder


def without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def cut_short(folder: Path) -> Path:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    return folder


def renamed_in(folder: Path, change: Callable[[str], str]) -> Path:
    renamed(change)(folder)
    return folder


def edited(folder: Path, **changes: object) -> Path:
    edit_json(folder / "config.json", **changes)
    return folder


def peft_folder(folder: Path) -> Path:
    folder.mkdir()
    edit_json(folder / "adapter_config.json", base_model_name_or_path="some/model")
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(1)}, folder / "adapter_model.safetensors")
    return folder


SLIPS: Mapping[str, tuple[Callable[[Path], Path], str]] = {
    "an adapter of PEFT": (
        lambda root: peft_folder(root / "peft"),
        r"holds a PEFT adapter of some/model.*merge it first",
    ),
    "a file of weights": (
        lambda root: root / "hf" / "model.safetensors",
        "no GGUF file; of other formats name the folder",
    ),
    "nothing": (lambda root: root / "none", "does not exist"),
    "a folder of models": (lambda root: root, r"did you mean .*hf\?"),
    "a copied snapshot": (lambda root: with_broken_link(root / "hf"), r"not there: tokenizer\.json; copy .* `cp -rL`"),
    "no weights": (lambda root: without(root / "hf", "model.safetensors"), "was a download broken off"),
    "weights cut short": (lambda root: cut_short(root / "hf"), "is cut short or damaged .* fetch it again"),
    "an adapter that was not merged": (
        lambda root: renamed_in(root / "hf", lambda name: f"base_model.model.{name}"),
        "adapter of PEFT that was not merged",
    ),
    "a classifier": (
        lambda root: edited(root / "hf", architectures=["LlamaForSequenceClassification"], num_hidden_layers=1),
        "LlamaForSequenceClassification has another head",
    ),
    "no kind of model": (lambda root: edited(root / "hf", model_type=None), "names no model_type"),
    "quantized weights": (lambda root: edited(root / "hf", quantization_config={"bits": 4}), "or a GGUF file"),
    "yarn without its factor": (
        lambda root: edited(root / "hf", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        r"factor is missing",
    ),
    "a kind of scaling that nobody knows": (
        lambda root: edited(root / "hf", rope_parameters={"rope_type": "wibble", "rope_theta": 1e4}),
        "'wibble' is not supported; default, linear, llama3 and yarn are",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_likely_slips_are_named(source: Path, tmp_path: Path, slip: str) -> None:
    make, words = SLIPS[slip]
    with pytest.raises(ModelError, match=words):
        convert(make(tmp_path), tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_quantize_of_an_unconverted_model_names_the_converter(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`dijiang convert` makes such models"):
        quantize_folder(source, tmp_path / "out", kind="int8")


def test_a_file_in_the_place_of_a_models_folder_names_the_converter(tmp_path: Path) -> None:
    path = write_gguf(llama_teacher(), tmp_path / "t.gguf")
    for use in (load_model, lambda file: quantize_folder(file, tmp_path / "out", kind="int8")):
        with pytest.raises(ConfigError, match=r"is a file, not the folder of a model; `dijiang convert .*t\.gguf OUT`"):
            use(path)


NO_MODEL: Mapping[str, tuple[Callable[[Path], Path], str]] = {
    "a run": (lambda root: run_folder(root / "run"), r"`dijiang merge MODEL .*run OUT` makes one"),
    "its adapter": (
        lambda root: run_folder(root / "run") / "adapter.safetensors",
        r"`dijiang merge MODEL .*adapter\.safetensors OUT` makes one of it",
    ),
    "an adapter of PEFT": (lambda root: peft_folder(root / "peft"), "holds a PEFT adapter of some/model"),
    "a folder of a GGUF": (lambda root: write_gguf(llama_teacher(), root / "t.gguf").parent, "`dijiang convert"),
    "nothing": (lambda root: root / "none", "does not exist, and nothing is downloaded"),
    "a folder of models": (lambda root: write_tiny_model(root / "inner").parent, r"did you mean .*inner\?"),
}


@pytest.mark.parametrize("kind", NO_MODEL)
def test_what_is_no_model_is_told_alike_by_every_command(tmp_path: Path, kind: str) -> None:
    make, words = NO_MODEL[kind]
    (tmp_path / "world").mkdir()
    path = make(tmp_path / "world")
    for use in (load_model, lambda folder: quantize_folder(folder, tmp_path / "out", kind="int8")):
        with pytest.raises(ConfigError, match=words):
            use(path)
    with pytest.raises(StartError, match=words):
        find_model(Settings(model=path), Notices())


def run_folder(folder: Path) -> Path:
    base = write_tiny_model(folder.parent / "base", llama_config(HYBRID, HYBRID))
    folder.mkdir()
    save_adapter(made_for(base), folder / "adapter.safetensors")
    return folder


def test_an_adapter_is_found_in_its_runs_folder(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", llama_config(HYBRID, HYBRID))
    (tmp_path / "run").mkdir()
    save_adapter(made_for(base), tmp_path / "run" / "adapter.safetensors")
    assert load_adapter(tmp_path / "run").sha256 == load_adapter(tmp_path / "run" / "adapter.safetensors").sha256
    with pytest.raises(CheckpointError, match=r"holds no adapter\.safetensors, as `dijiang train` writes it"):
        load_adapter(base)
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK" * 500)
    with pytest.raises(CheckpointError, match="name a run's folder, or adapter"):
        load_adapter(tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="holds a PEFT adapter of some/model"):
        load_adapter(peft_folder(tmp_path / "an adapter"))
    with pytest.raises(CheckpointError, match="one of the library PEFT"):
        load_adapter(peft_folder(tmp_path / "peft") / "adapter_model.safetensors")


def test_one_part_of_a_gguf_is_told_to_be_joined(tmp_path: Path) -> None:
    path = write_gguf(llama_teacher(), tmp_path / "a-00001-of-00002.gguf", metadata={"split.count": 2})
    with pytest.raises(ConversionError, match="is one of 2 parts; join them first"):
        convert(path, tmp_path / "out")
