"""From the command to a server that answers: seconds on the clock, of the processor, and where they go.

    python benchmarks/experiments/start.py

Starts `dijiang serve` some times (the default model must have been made before), asks /ready until it says yes, and
reads what the processor spent on both processes by then: on a machine that others use too, those seconds are the ones
to compare. Then single parts are measured, each in a process of its own. The last line is JSON.
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import this_machine, write_result
from dijiang_model.conversion.default_model import ensure_default_model

TIMEOUT_S = 120.0
PARTS = {
    "Python": "pass",
    "serving process: settings": "import server.startup.flags",
    "serving process: all but the application": "import server.startup.flags, server.startup.assemble",
    "serving process: application": "import server.startup.flags, server.startup.assemble, server.app",
    "engine: before its configuration": "import server.engine.process.main",
    "engine: torch": "import torch",
    "engine: everything": "import server.engine.process.main, server.engine.loading",
    "engine: weights too": "import server.engine.process.main, server.engine.loading as L; L.load_model({folder!r})",
    "engine: int8 weights too": (
        "import server.engine.process.main, server.engine.loading as L; L.load_model({folder!r}, weights='int8')"
    ),
}
"""Each includes those of the same process that come before it."""


@dataclass(frozen=True, slots=True)
class Start:
    """One start, seconds. CPU time is that of both processes until the server is ready.

    Attributes:
        listening: until the port takes connections.
        ready: until /ready says yes.
        serving_cpu, engine_cpu: user and system time of the two processes.
    """

    listening: float
    ready: float
    serving_cpu: float
    engine_cpu: float


@contextmanager
def served(arguments: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "server", "serve", "--port", str(port), "--states-folder", folder, *arguments]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "DIJIANG_LOG_LEVEL": "error"})
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(TIMEOUT_S)


def measure(arguments: list[str]) -> Start:
    """One start.

    Raises:
        RuntimeError: the server ended, or was not ready in time.
    """
    begin = time.perf_counter()
    listening: float | None = None
    with served(arguments) as (process, url), httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        while time.perf_counter() - begin < TIMEOUT_S and process.poll() is None:
            try:
                response = client.get("/ready")
            except httpx.TransportError:
                time.sleep(0.01)
                continue
            now = time.perf_counter() - begin
            listening = now if listening is None else listening
            if response.status_code == 200:
                serving = psutil.Process(process.pid)
                engine = sum(_cpu_s(child) for child in serving.children(recursive=True))
                return Start(listening, now, _cpu_s(serving), engine)
            time.sleep(0.01)
    raise RuntimeError(f"the server was not ready after {TIMEOUT_S:.0f} s, or ended: {process.returncode}")


def part_cpu_s(code: str) -> float:
    """CPU seconds of a process that runs some code."""
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return float(spent)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def table(starts: list[Start], parts: dict[str, float]) -> Table:
    shown = Table("what", "seconds", "best")
    for name, label in (
        ("listening", "port open, clock"),
        ("ready", "ready, clock"),
        ("serving_cpu", "serving process, CPU"),
        ("engine_cpu", "engine process, CPU"),
    ):
        values = [getattr(start, name) for start in starts]
        shown.add_row(label, f"{statistics.median(values):.2f}", f"{min(values):.2f}")
    for name, seconds in parts.items():
        shown.add_row(f"{name}, CPU", f"{seconds:.2f}", "")
    return shown


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of the model; the default model if absent.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    dtype: Annotated[str, typer.Option(help="--dtype of the server.")] = "auto",
) -> None:
    """Measures starts and writes them to benchmarks/results/."""
    folder = ensure_default_model(None) if model is None else model
    machine = this_machine()
    arguments = ["--dtype", dtype, *([] if model is None else [str(model)])]
    measure(arguments)  # fills the system's file cache
    starts = [measure(arguments) for _ in range(rounds)]
    parts = {
        name: statistics.median(part_cpu_s(code.format(folder=str(folder))) for _ in range(3))
        for name, code in PARTS.items()
    }
    Console(width=100).print(table(starts, parts))
    result = {
        "model": folder.name,
        "dtype": dtype,
        "starts": [asdict(start) for start in starts],
        "parts_cpu_s": parts,
    }
    print(write_result("start", machine, result))


if __name__ == "__main__":
    typer.run(main)
