"""A running server with a tiny model, and the environments of the clients, one for each file of requirements."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.serving import Server, serving
from tests.tiny_models import write_tiny_model

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv-clients"
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Tiny:
    """The server and the folder of its model."""

    server: Server
    folder: Path


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    states = tmp_path_factory.mktemp("states")
    with serving(folder, "--states-folder", str(states)) as server:
        yield Tiny(server, folder)


def run_client(command: list[str], *, home: Path, **variables: str) -> str:
    """Runs a program of a client's environment that must end well; what it wrote to standard output."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_PROXY": "127.0.0.1",
        "OPENAI_API_KEY": "none",
        **variables,
    }
    done = subprocess.run(
        command, env=environment, cwd=home, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def require(name: str, path: str) -> Path:
    """A file in the environment of a client; skips the test where it could not be installed."""
    wanted = ENVIRONMENTS / name / path
    if not wanted.exists():
        pytest.skip(f"NOT RUN: {name} is not installed; `make test-clients` tries to")
    return wanted
