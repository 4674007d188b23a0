"""The note that the default model is current: believed only as long as nothing has changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dijiang_model.conversion import default_folder
from dijiang_model.conversion.default_folder import MODEL_NAME, is_noted, note


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = default_folder.default_folder(tmp_path)
    found.mkdir(parents=True)
    (found / "config.json").write_text("{}")
    (found / "model.safetensors").write_bytes(b"weights")
    return found


def test_the_default_folder_is_in_the_home_that_is_named(tmp_path: Path) -> None:
    assert default_folder.default_folder(tmp_path) == tmp_path / "models" / MODEL_NAME
    assert default_folder.default_folder().is_relative_to(default_folder.default_home())


def test_a_noted_model_is_believed_until_a_file_of_it_changes(folder: Path) -> None:
    assert not is_noted(folder)
    note(folder)
    assert is_noted(folder)
    (folder / "model.safetensors").write_bytes(b"others!")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert not is_noted(folder)
    note(folder)
    (folder / "more.json").write_text("{}")
    assert not is_noted(folder)


def test_other_code_or_another_adapter_voids_the_note(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    (package / "adapters").mkdir(parents=True)
    (package / "code.py").write_text("a = 1")
    (package / "adapters" / "one.safetensors").write_bytes(b"1")
    monkeypatch.setattr(default_folder, "_PACKAGE", package)
    note(folder)
    assert is_noted(folder)
    (package / "code.py").write_text("a = 22")
    assert not is_noted(folder)
    note(folder)
    (package / "adapters" / "one.safetensors").write_bytes(b"22")
    assert not is_noted(folder)


def test_a_model_that_is_gone_is_not_believed(folder: Path) -> None:
    note(folder)
    (folder / "config.json").unlink()
    assert not is_noted(folder)
    note(folder)
    assert not is_noted(folder)


def test_what_cannot_be_noted_is_looked_at_again(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "model"
    note(missing)
    assert not is_noted(missing)


def test_asking_takes_no_torch() -> None:
    code = "import sys, dijiang_model.conversion.default_folder as d; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
