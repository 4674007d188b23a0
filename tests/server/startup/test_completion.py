"""Shells complete the program's commands, those below them, and their options."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_layout import ROOT
from tests.waiting import PATIENCE_S

LINES = {
    "dijiang st": "state",
    "dijiang state re": "repair",
    "dijiang bench ne": "neighbour",
    "dijiang serve --states-f": "--states-folder",
    "dijiang chat --res": "--resume",
    "dijiang state export --over": "--overwrite",
}
"""What was typed, and one of the words that it may become."""


def asked(shell: str, line: str) -> dict[str, str]:
    """What a shell puts into the environment of the program that it asks."""
    return {
        "_DIJIANG_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }


def run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("line", LINES)
def test_commands_and_options_are_completed(shell: str, line: str) -> None:
    assert LINES[line] in run([sys.executable, "-m", "server"], asked(shell, line))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_shown(shell: str) -> None:
    variables = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    assert "_DIJIANG_COMPLETE" in run([sys.executable, "-m", "server", "--show-completion", shell], variables)


def test_bash_itself_completes_with_the_script(tmp_path: Path) -> None:
    program = tmp_path / "dijiang"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m server "$@"\n')
    program.chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    script = (
        "source <(dijiang --show-completion bash); COMP_WORDS=(dijiang state ex); COMP_CWORD=2; "
        '_dijiang_completion dijiang; echo "${COMPREPLY[@]}"'
    )
    assert run(["bash", "-c", script], variables).split() == ["export"]
