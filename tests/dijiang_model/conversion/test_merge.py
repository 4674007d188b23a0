"""`dijiang merge`: the merged folder computes what base and adapter compute, and its card says what was measured."""

from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.checkpoints.config_json import read_stored_config
from dijiang_model.conversion.merge_cli import merge_command
from dijiang_model.conversion.training.adapters import adapted_model, load_adapter, save_adapter
from tests.dijiang_model.conversion.training.test_adapters import made_for
from tests.dijiang_model.stepping import logits_of, random_text
from tests.tiny_models import HYBRID, llama_config, write_tiny_model

app = Typer()
app.command()(merge_command)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "base", llama_config(HYBRID, HYBRID))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    save_adapter(made_for(base), tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "300", "NO_COLOR": "1"})
    return result.exit_code, result.output


def test_a_merged_folder_is_base_and_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "tables.md").write_text("A table | of numbers.\n")
    code, output = run(base, adapter, tmp_path / "out", "--report", tmp_path / "report")
    assert code == 0, output
    assert "DiJiang hybrid, window 9+2. Serve it with `dijiang serve" in output
    text = random_text(60)
    expected = logits_of(adapted_model(load_model(base), load_adapter(adapter)), text)
    assert torch.equal(logits_of(load_model(tmp_path / "out"), text), expected)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "1,000 tokens after the swap" in card
    assert "## Evaluation\n\nA table | of numbers." in card
    assert "see the evaluation below" in card
    assert read_stored_config(tmp_path / "out").origin.tokens_trained == 1000
    assert run(base, adapter, tmp_path / "out")[0] == 1
    assert run(base, adapter, tmp_path / "out", "--overwrite")[0] == 0
    assert "not measured for this conversion" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda base, adapter: write_tiny_model(base, llama_config(HYBRID, HYBRID), seed=1),
            "this model is another one",
        ),
        (lambda base, adapter: adapter.write_bytes(adapter.read_bytes()[:-100]), "not a readable adapter"),
        (lambda base, adapter: adapter.unlink(), "not a readable adapter"),
        (lambda base, adapter: (base / "model.safetensors").write_bytes(b"x"), "not a readable safetensors file"),
    ],
    ids=["another base", "a cut adapter", "no adapter", "a damaged base"],
)
def test_what_cannot_be_merged_is_a_sentence_and_leaves_nothing(
    base: Path, adapter: Path, tmp_path: Path, spoil: object, words: str
) -> None:
    spoil(base, adapter)  # type: ignore[operator]
    code, output = run(base, adapter, tmp_path / "out")
    assert (code, "Traceback" in output) == (1, False)
    assert words in output
    assert not (tmp_path / "out").exists()


def test_a_report_that_is_none_is_a_sentence(base: Path, adapter: Path, tmp_path: Path) -> None:
    code, output = run(base, adapter, tmp_path / "out", "--report", tmp_path)
    assert code == 1
    assert "holds no tables.md" in output
    assert not (tmp_path / "out").exists()
