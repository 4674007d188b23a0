"""What commands write: no arrangement of folders and links makes one remove a byte that this program did not write."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer import Exit

from dijiang_model.checkpoints.outputs import check_replaceable, output_folder
from dijiang_model.conversion import convert as convert_module
from dijiang_model.conversion.convert import convert
from dijiang_model.conversion.evaluation.cli import evaluate_command
from dijiang_model.conversion.evaluation.report import REPORT_FILES
from dijiang_model.conversion.merge import merge
from dijiang_model.conversion.quantize import quantize_folder
from dijiang_model.conversion.training.adapters import save_adapter
from dijiang_model.conversion.training.setup import RUN_FILES, prepare_run
from dijiang_model.conversion.training.train import train
from dijiang_model.errors import CheckpointError, ModelError
from tests.dijiang_model.conversion.training.test_adapters import made_for
from tests.dijiang_model.conversion.training.test_train import STUDENT, options
from tests.dijiang_model.hf.conftest import load
from tests.dijiang_model.teachers import llama_teacher, save_teacher
from tests.tiny_models import HYBRID, llama_config, write_tiny_model

COMMANDS = ("convert", "quantize", "merge", "train", "evaluate", "save_pretrained")
PLACES = ("hf", "model", "second", "run", "texts", "home", "new", "report")
"""An HF model, our model that is read, one that is not, a run, texts, somebody's folder, nothing, a report."""
NESTED = ("", "inside", "..", "texts", "../texts", "../hf")
FOREIGN = (
    "notes.txt",
    "model.safetensors",
    "adapter.safetensors",
    "report.md",
    "answers.txt",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "log.jsonl",
)


@dataclass(frozen=True)
class World:
    """A folder with one of everything."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pattern")
    save_teacher(llama_teacher(tie_word_embeddings=True), root / "hf")
    write_tiny_model(root / "model", llama_config(HYBRID, HYBRID))
    write_tiny_model(root / "second", llama_config(HYBRID, HYBRID), seed=1)
    (root / "texts").mkdir()
    (root / "texts" / "text.txt").write_text("".join(f"Line {n} of a text.\n" for n in range(60)))
    (root / "run").mkdir()
    save_adapter(made_for(root / "model"), root / "run" / "adapter.safetensors")
    (root / "report").mkdir()
    members = dict.fromkeys(("model", "teacher", "title", "scores", "state_bytes"), "")
    (root / "report" / "report.json").write_text(json.dumps(members))
    (root / "home").mkdir()
    (root / "home" / "diary.txt").write_text("Dear diary")
    return root


def contents(root: Path) -> dict[str, str]:
    """SHA-256 of every file by its path, links not followed."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def run_command(name: str, world: World, out: Path, *, overwrite: bool, model: Path) -> None:
    text = world.texts / "text.txt"
    match name:
        case "convert":
            convert(world.hf, out, overwrite=overwrite)
        case "quantize":
            quantize_folder(model, out, kind="int8", overwrite=overwrite)
        case "merge":
            merge(world.model, world.run / "adapter.safetensors", out, overwrite=overwrite)
        case "train":
            small = options(tokens=64, sequence_length=64, stages=(1,), lora_rank=0)
            trainer = prepare_run(model, [str(text)], out, small, STUDENT, resume=overwrite)
            train(trainer, out)
        case "evaluate":
            evaluate_command(model, model, [text], out, windows=1, length=66, facts=0)
        case "save_pretrained":
            load(model).save_pretrained(out, max_shard_size="60KB" if overwrite else "1GB")


@settings(max_examples=80, deadline=None)
@given(
    command=st.sampled_from(COMMANDS),
    place=st.sampled_from(PLACES),
    nested=st.sampled_from(NESTED),
    overwrite=st.booleans(),
    is_link=st.booleans(),
    reads_through_link=st.booleans(),
    foreign=st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(FOREIGN)), max_size=3),
)
def test_no_arrangement_of_folders_loses_a_byte_that_was_not_written_here(
    pattern: Path,
    tmp_path_factory: pytest.TempPathFactory,
    command: str,
    place: str,
    nested: str,
    overwrite: bool,
    is_link: bool,
    reads_through_link: bool,
    foreign: list[tuple[str, str]],
) -> None:
    root = tmp_path_factory.mktemp("world") / "root"
    shutil.copytree(pattern, root)
    world = World(root)
    for folder, name in foreign:
        if (root / folder).is_dir() and not (root / folder / name).exists():
            (root / folder / name).write_text(f"{name} of somebody")
    out = root / place / nested if nested else root / place
    if is_link:
        (root / "link").symlink_to(os.path.normpath(out))
        out = root / "link"
    model = world.model
    if reads_through_link:
        (root / "alias").symlink_to(world.model)
        model = root / "alias"
    before = contents(root)
    try:
        run_command(command, world, out, overwrite=overwrite, model=model)
    except (ModelError, Exit):
        assert contents(root) == before
        return
    lost = {name for name, digest in before.items() if contents(root).get(name) != digest}
    # What may be replaced: a whole model that nothing reads, on request; a report; a run's own files, when resumed; the
    # weights of a model, by `save_pretrained`, which writes beside whatever else is in a folder.
    replaceable = {
        "convert": ("model/", "second/"), "quantize": ("second/",), "merge": ("second/",), "train": (),
        "evaluate": ("report/report.json",), "save_pretrained": ("model/", "second/"),
    }[command]  # fmt: skip
    assert all(overwrite or command in ("evaluate", "save_pretrained") for _ in lost)
    assert all(name.startswith(replaceable) for name in lost if replaceable), lost
    assert not lost or replaceable
    assert not {f"{folder}/{name}" for folder, name in foreign} & (lost - set(contents(pattern)))


@pytest.mark.parametrize("spelling", ["hf", "hf/../hf", "link", "hf/inside", "link/inside", "."])
def test_an_output_is_never_an_input_nor_around_nor_inside_of_it(tmp_path: Path, spelling: str) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="is read here"):
        output_folder(tmp_path / spelling, inputs=[tmp_path / "hf"])
    with pytest.raises(CheckpointError, match="is read here"):
        output_folder(tmp_path / spelling, inputs=[tmp_path / "link"])


def test_a_folder_that_an_inputs_links_point_into_is_no_output(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "0123").write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to(blobs / "0123")
    with pytest.raises(CheckpointError, match="contains"):
        output_folder(blobs, inputs=[snapshot])
    assert output_folder(tmp_path / "out", inputs=[snapshot]) == (tmp_path / "out").resolve()


def test_beside_an_input_is_a_fine_place(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert output_folder(tmp_path / "out", inputs=[tmp_path / "model.gguf"]) == (tmp_path / "out").resolve()
    with pytest.raises(CheckpointError, match="contains"):
        output_folder(tmp_path, inputs=[tmp_path / "model.gguf"])


def test_an_output_may_be_a_link_to_a_folder(tmp_path: Path) -> None:
    save_teacher(llama_teacher(), tmp_path / "hf")
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    convert(tmp_path / "hf", tmp_path / "out")
    convert(tmp_path / "hf", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "config.json").is_file()


def _add(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("mine")


SPOILS: Mapping[str, Callable[[Path], object]] = {
    "a file of another name": _add("notes.txt"),
    "a folder": lambda folder: (folder / "runs").mkdir(),
    "a link": lambda folder: (folder / "vocab.json").symlink_to(folder / "config.json"),
    "another model's config": lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
    "no config": lambda folder: (folder / "config.json").unlink(),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_only_a_model_that_was_saved_here_is_replaced(tmp_path: Path, spoil: str) -> None:
    folder = write_tiny_model(tmp_path / "model")
    check_replaceable(folder, overwrite=True)
    SPOILS[spoil](folder)
    with pytest.raises(CheckpointError, match="is never replaced"):
        check_replaceable(folder, overwrite=True)


def test_refusals_come_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_teacher(llama_teacher(), tmp_path / "hf")
    monkeypatch.setattr(convert_module, "open_source", lambda path: pytest.fail("the source was read"))
    with pytest.raises(CheckpointError, match="is read here"):
        convert(tmp_path / "hf", tmp_path / "hf", overwrite=True)


@pytest.mark.parametrize("name", RUN_FILES)
def test_an_earlier_run_is_refused_and_both_choices_are_named(pattern: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("earlier")
    with pytest.raises(CheckpointError, match=r"`--resume` continues .* another `--out`"):
        prepare_run(pattern / "model", [str(pattern / "texts" / "text.txt")], tmp_path, options(), STUDENT)
    assert (tmp_path / name).read_text() == "earlier"


def test_a_run_that_ended_before_its_first_step_stands_in_nobodys_way(pattern: Path, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").touch()
    small = options(tokens=64, sequence_length=64, stages=(1,), lora_rank=0)
    trainer = prepare_run(pattern / "model", [str(pattern / "texts")], tmp_path, small, STUDENT)
    assert train(trainer, tmp_path)


def test_a_run_killed_while_the_teacher_wrote_begins_again_with_its_answers(pattern: Path, tmp_path: Path) -> None:
    (tmp_path / "answers.txt").write_text("".join(f"Answer {n}.\n" for n in range(60)))
    small = options(tokens=64, sequence_length=64, stages=(1,), lora_rank=0)
    trainer = prepare_run(
        pattern / "model", [str(pattern / "texts")], tmp_path, small, STUDENT, resume=True, self_distill=64
    )
    assert train(trainer, tmp_path)
    assert (tmp_path / "answers.txt").read_text().startswith("Answer 0.\n")


@pytest.mark.parametrize("name", REPORT_FILES)
def test_a_file_with_a_reports_name_is_not_overwritten(pattern: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(Exit):
        run_command("evaluate", World(pattern), tmp_path, overwrite=False, model=pattern / "model")
    assert (tmp_path / name).read_text() == "{}"
