"""Hints name the program so that what they print can be typed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dijiang_model.program import program
from tests.test_layout import ROOT


@pytest.mark.parametrize("is_on_path", [False, True])
def test_a_hint_can_be_typed_as_it_is_printed(is_on_path: bool, tmp_path: Path) -> None:
    script = tmp_path / "bin" / "dijiang"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nfrom server.cli import main\nmain()\n")
    script.chmod(0o755)
    (tmp_path / "model.gguf").write_bytes(b"")
    path = f"{script.parent}{os.pathsep}" if is_on_path else ""
    environment = {"PATH": f"{path}/usr/bin:/bin", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = ["bin/dijiang", "serve", "model.gguf"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert f"`{'dijiang' if is_on_path else 'bin/dijiang'} convert model.gguf OUT` makes one of it" in done.stderr


def test_other_programs_name_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["notebook.py"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert program() == "dijiang"
