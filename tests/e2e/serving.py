"""A running `dijiang serve`, and the little that tests want to know about it from outside."""

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import openai
import psutil

from tests.ports import free_port
from tests.waiting import PATIENCE_S, until


@dataclass
class Server:
    """Where it listens, its process, the official client for it (without retries), and what it serves."""

    base_url: str
    process: psutil.Process
    client: openai.OpenAI
    model: str = ""

    @property
    def engine(self) -> psutil.Process:
        """The engine process."""
        return next(child for child in self.process.children() if "server.engine.process.main" in child.cmdline())

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.base_url}{path}", timeout=PATIENCE_S)

    def gauge(self, name: str) -> float:
        """A number from /metrics."""
        match = re.search(rf"^{name} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert match is not None, name
        return float(match.group(1))

    def greedy(self, prompt: str | list[int], *, max_tokens: int, **extra: object) -> str:
        """The text of one greedy completion."""
        answer = self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body=extra
        )
        return answer.choices[0].text


@contextlib.contextmanager
def serving(model: Path, *options: str, output: int | IO[bytes] = subprocess.DEVNULL) -> Iterator[Server]:
    """Starts the real command on a free port, waits until it is ready, ends it and checks that it ends.

    Args:
        output: where everything goes that it writes.
    """
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", str(model), "--port", str(port), "--threads", "1", *options]
    if not any(option.startswith("--states") for option in options):
        command.append("--no-states")  # their default place is the user's
    base_url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, stdout=output, stderr=output)
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
    server = Server(base_url, psutil.Process(process.pid), client)
    try:
        until(lambda: process.poll() is not None or _is_ready(server))
        assert process.poll() is None, f"the server ended with status {process.poll()}"
        server.model = server.get("/v1/models").json()["data"][0]["id"]
        yield server
    finally:
        client.close()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=PATIENCE_S)
        finally:
            process.kill()


def _is_ready(server: Server) -> bool:
    try:
        return server.get("/ready").status_code == 200
    except httpx.TransportError:
        return False
