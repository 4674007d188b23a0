"""The playground's own JavaScript, run by Node: what needs no page alone, the rest against a real server."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.playground.proxy import below
from tests.server.states.running import ANN, running
from tests.tiny_models import write_tiny_model
from tests.waiting import PATIENCE_S

HERE = Path(__file__).parent
MODULES = HERE.parents[2] / "server/playground"
pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")


def run_node(program: str, *arguments: str) -> None:
    command = ["node", str(HERE / program), str(MODULES), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"


def test_events_numbers_tokens_trees_and_files() -> None:
    run_node("logic.mjs")


def test_what_is_said_is_kept_whatever_happens() -> None:
    run_node("talks.mjs")


def test_conversations_and_states_at_a_server_below_a_path(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    with running(model, tmp_path / "states") as server, below("/some/path", server.base_url) as address:
        run_node("states.mjs", f"{address}/", ANN)
