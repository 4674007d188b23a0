"""The engine and its model need torch and what reads checkpoints, not what the service is made of."""

import subprocess
import sys

from tests.waiting import PATIENCE_S

PROGRAM = """\
import sys

BLOCKED = {"fastapi", "httpx", "hypothesis", "llguidance", "msgspec", "openai", "psutil", "pydantic", "starlette"}
BLOCKED |= {"structlog", "uvicorn", "zmq"}


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Absent())
from tests.server.engine.some_requests import mixed_requests
from tests.server.engine.test_engine_cuda import answers

outputs = answers("cpu", mixed_requests(6), family="llama")
assert [len(tokens) for tokens in outputs.values()] == [8] * 6, outputs
"""


def test_an_engine_runs_where_nothing_of_the_service_is_installed() -> None:
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert program.returncode == 0, program.stderr
