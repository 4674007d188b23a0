"""llm-comply, a compliance tester, on the default model: all that it tries passes but what is decided otherwise."""

import json
import subprocess
from collections.abc import Iterator

import pytest

from dijiang_model.conversion.default_model import ensure_default_model
from tests.compat.conftest import require
from tests.e2e.serving import Server, serving

pytestmark = [pytest.mark.clients, pytest.mark.slow, pytest.mark.timeout(1800)]
REFUSED = {
    "openai-chat": {"Image Input", "Error Handling"},
    "open-responses": {"Image Input", "Error Handling"},
    "anthropic": {"Image Input"},
}
"""Images are not taken, and a request without `model` is no error: docs/decisions/0028."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(ensure_default_model()) as running:
        yield running


@pytest.mark.parametrize("dialect", REFUSED)
def test_a_dialect_passes(server: Server, dialect: str) -> None:
    tester = require("llm-comply", "bin/llm-comply")
    command = [str(tester), "-u", f"{server.base_url}/v1", "-k", "any", "-m", server.model]
    command += ["--format", dialect, "--json", "--timeout", "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    results = json.loads(done.stdout)["results"]
    assert {result["name"] for result in results if result["status"] == "failed"} == REFUSED[dialect], done.stdout
    assert sum(result["status"] == "passed" for result in results) >= 6, done.stdout
