"""The page on transformers does what it says, from top to bottom, with a tiny model."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.test_docs import ROOT

LIBRARIES = {"Trainer(": ("accelerate",), "trl": ("accelerate", "datasets", "peft", "trl")}
"""What a snippet needs besides transformers, by what is in it."""
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/transformers.md").read_text(), re.DOTALL)


@pytest.mark.filterwarnings("default")
def test_every_snippet_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(folder)
    known: dict[str, object] = {}
    for snippet in SNIPPETS:
        needed = next((names for part, names in LIBRARIES.items() if part in snippet), ())
        for name in needed:
            pytest.importorskip(name)
        exec(compile(snippet, "docs/transformers.md", "exec"), known)
    assert (tmp_path / "MERGED" / "model.safetensors").is_file()


def test_a_module_is_run_with_our_models_registered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = "import sys, transformers; print(type(transformers.AutoConfig.from_pretrained(sys.argv[1])).__name__)"
    (tmp_path / "some_program.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dijiang_model.hf", "some_program", str(folder)])
    runpy.run_module("dijiang_model.hf", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out == "DiJiangConfig\n"


def test_without_a_module_the_usage_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dijiang_model.hf"])
    with pytest.raises(SystemExit, match=r"usage: python -m dijiang_model\.hf"):
        runpy.run_module("dijiang_model.hf", run_name="__main__")
