"""A real fleet: `dijiang ray deploy` on a cluster of its own, on this machine."""

import contextlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from tests.ports import free_port
from tests.server.states.running import ANN, bearer
from tests.waiting import PATIENCE_S, until

CONFIG = "fleet.toml"
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "600",
}


@dataclass
class Fleet:
    """Its process, its clients (which never try again), and how to change it."""

    folder: Path
    port: int
    serve: dict[str, Any]
    process: subprocess.Popen[bytes]
    http: httpx.Client

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.base_url}/v1", api_key=ANN, max_retries=0, timeout=PATIENCE_S)

    def deploy(self, *, serve: dict[str, Any] | None = None, **fleet: Any) -> None:
        """Another configuration, of the running fleet; returns when Ray has taken it.

        Not the one that it has: Ray would replace every engine.
        """
        path = self.folder / CONFIG
        before = path.read_text()
        write_config(path, fleet, self.serve | (serve or {}))
        if path.read_text() == before:
            return
        address = self.log.partition("the cluster is ")[2].split()[0]
        command = [*_COMMAND, str(path), "--address", address, "--port", str(self.port)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def engines(self) -> list[psutil.Process]:
        """Ray's processes that have an engine."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):
                if child.cmdline()[0].startswith("ray::ServeReplica") and ":Engine" in child.cmdline()[0]:
                    found.append(child)
        return found

    @property
    def names(self) -> set[str]:
        """Of the replicas that answer."""
        lines = self.http.get("/metrics").text.splitlines()
        return {line.split('"')[1] for line in lines if line.startswith("dijiang_engine_up{") and line.endswith(" 1.0")}

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer to a request that must work."""
        response = self.http.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()  # type: ignore[no-any-return]

    def complete(self, **body: Any) -> dict[str, Any]:
        """One greedy completion: its choice."""
        more = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True, **body}
        choice: dict[str, Any] = self.post("/v1/completions", **more)["choices"][0]
        return choice


_COMMAND = [sys.executable, "-m", "server", "ray", "deploy"]


def write_config(path: Path, fleet: dict[str, Any], serve: dict[str, Any]) -> Path:
    """A configuration whose engines take hardly anything."""
    fleet = {"cpus": 0.01, "min_replicas": 1, "max_replicas": 2, "health_check_s": 1.0, **fleet}
    tables = {"fleet": fleet, "serve": serve}
    path.write_text("".join(f"[{name}]\n{_lines(table)}" for name, table in tables.items()))
    assert tomllib.loads(path.read_text()) == tables
    return path


def _lines(table: dict[str, Any]) -> str:
    quoted = {name: f'"{value}"' if isinstance(value, str) else str(value).lower() for name, value in table.items()}
    return "".join(f"{name} = {value}\n" for name, value in quoted.items())


@contextlib.contextmanager
def running_fleet(folder: Path, serve: dict[str, Any], **fleet: Any) -> Iterator[Fleet]:
    """Starts one, waits until it is ready, and ends it with all its processes."""
    port = free_port()
    path = write_config(folder / CONFIG, fleet, serve)
    command = [*_COMMAND, str(path), "--address", "local", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | ENVIRONMENT)
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S, headers=bearer(ANN), trust_env=False)
    started = Fleet(folder, port, serve, process, http)
    children: list[psutil.Process] = []
    try:
        until(lambda: "the cluster is " in started.log or process.poll() is not None, or_fail=lambda: started.log)
        assert process.poll() is None, started.log
        yield started
    finally:
        http.close()
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
        process.kill()
        _, alive = psutil.wait_procs(children, 10)
        for child in alive:
            child.kill()
