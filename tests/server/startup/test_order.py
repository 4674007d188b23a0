"""What is imported before the engine's process is started keeps it waiting."""

import subprocess
import sys

import pytest

LATE = (
    "torch",
    "numpy",
    "jinja2",
    "tokenizers",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "server.service",
    "server.app",
)


@pytest.mark.parametrize("module", ["server.startup.flags", "server.startup.run"])
def test_the_engine_waits_for_nothing_that_it_does_not_need(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {LATE!r} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert told.stdout.strip() == "[]"
