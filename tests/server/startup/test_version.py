"""One version, that of pyproject.toml, wherever it is shown."""

import subprocess
import sys
import tomllib

from tests.test_layout import ROOT
from tests.waiting import PATIENCE_S

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_program_shows_it() -> None:
    command = [sys.executable, "-m", "server", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout
    assert shown == f"dijiang {VERSION}\n"


def test_the_first_page_agrees() -> None:
    assert f"Version {VERSION.removesuffix('.0')}." in (ROOT / "README.md").read_text()
