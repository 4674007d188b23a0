"""The `dijiang` program: quick help, every setting as a flag, errors as sentences."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from server.startup.settings import Settings, flag_of
from tests.waiting import PATIENCE_S

HEAVY = "torch", "transformers", "fastapi", "uvicorn", "tokenizers", "numpy", "ray"


def dijiang(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    variables = {
        "PATH": "/usr/bin",
        "COLUMNS": "200",
        "TERM": "dumb",
        **(environment if environment is not None else {}),
    }
    command = [sys.executable, "-m", "server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=PATIENCE_S, check=False)


HELP_OF_ALL = f"""
import contextlib, io, json, sys
from typer.main import get_command
from server import cli

told = {{}}


def ask(*names):
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        cli.app([*names, "--help"], prog_name="dijiang")
    told[" ".join(names)] = (written.getvalue(), [name for name in {HEAVY!r} if name in sys.modules])


def walk(group, *names):
    ask(*names)
    for name in getattr(group, "commands", {{}}):
        context = group.make_context("dijiang", [name], resilient_parsing=True)
        walk(group.resolve_command(context, [name])[1], *names, name)


walk(get_command(cli.app))
print(json.dumps(told))
"""


def test_the_help_of_no_command_imports_anything_heavy() -> None:
    command = [sys.executable, "-c", HELP_OF_ALL]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    told: dict[str, tuple[str, list[str]]] = json.loads(answer.stdout)
    assert {"", "serve", "convert", "bench decode", "state repair", "ray deploy"} <= told.keys()
    assert {name: found for name, (_, found) in told.items() if found} == {}
    assert [name for name, (text, _) in told.items() if f"dijiang {name}".strip() not in text] == []


def test_without_a_command_the_help_is_shown() -> None:
    assert "serve" in dijiang().stdout


def test_the_version_is_shown() -> None:
    assert dijiang("--version").stdout.startswith("dijiang ")


def test_serve_help_explains_every_setting() -> None:
    text = dijiang("serve", "--help").stdout
    for name in Settings.model_fields:
        assert name == "model" or flag_of(name) in text


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--no-such-flag"], {}, "No such option"),
        (["--port", "x"], {}, "--port (DIJIANG_PORT)"),
        ([], {"DIJIANG_PROT": "1"}, "did you mean DIJIANG_PORT?"),
        (["nowhere"], {}, "nowhere is not the folder of a model: it does not exist"),
        (["--state-memory", "lots"], {}, "--state-memory (DIJIANG_STATE_MEMORY): must be a size, such as 512MiB"),
        (["nowhere"], {"DIJIANG_MODEL": "elsewhere"}, "nowhere is not the folder"),
        ([], {"DIJIANG_MODEL": "elsewhere"}, "elsewhere is not the folder"),
    ],
)
def test_mistakes_are_sentences_and_end_with_a_status(
    arguments: list[str], environment: dict[str, str], message: str
) -> None:
    answer = dijiang("serve", *arguments, environment=environment)
    assert answer.returncode != 0
    assert message in " ".join(answer.stderr.split())
    assert "Traceback" not in answer.stderr


def test_a_file_is_not_a_folder_and_a_gguf_file_can_become_one(tmp_path: Path) -> None:
    for name, message in (
        ("model.gguf", "model.gguf OUT` makes one"),
        ("notes.txt", "is a file, not the folder"),
    ):
        (tmp_path / name).write_text("x")
        assert message in " ".join(dijiang("serve", str(tmp_path / name)).stderr.split())


def test_a_port_in_use_is_told_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        answer = dijiang("serve", str(tmp_path), "--port", port, "--no-states")
    assert answer.returncode == 1
    assert f"127.0.0.1 port {port} cannot be used" in " ".join(answer.stderr.split())
    assert "--port 0 takes a free one" in " ".join(answer.stderr.split())


def test_a_folder_with_a_damaged_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    answer = dijiang("serve", str(tmp_path), "--port", "0")
    assert answer.returncode == 1
    assert "error:" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_certificate_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pem").write_text("no certificate")
    pem = str(tmp_path / "pem")
    states = str(tmp_path / "states")  # not the one of whoever runs this
    answer = dijiang("serve", str(tmp_path), "--port=0", "--states-folder", states, "--tls-cert", pem, "--tls-key", pem)
    assert answer.returncode == 1
    assert "error: tls_cert and tls_key cannot be used" in " ".join(answer.stderr.split())
