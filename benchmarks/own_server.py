"""A `dijiang serve` for the time of a benchmark, on a free port of this machine."""

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import httpx

START_TIMEOUT_S = 300.0
END_TIMEOUT_S = 30.0
POLL_S = 0.05


class ServerStartError(Exception):
    """The server ended, or was not ready in time; the text has its last words."""


@contextlib.contextmanager
def serving(model: Path, *options: str) -> Iterator[str]:
    """Starts the real command, waits until it is ready, answers its address and ends it afterwards.

    Args:
        options: of `dijiang serve`.

    Raises:
        ServerStartError: it does not come up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "server", "serve", str(model), "--port", str(port), "--no-states", *options]
    with tempfile.TemporaryFile("w+") as words:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=words)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until_ready(process, address, words)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=END_TIMEOUT_S)
            finally:
                process.kill()
                process.wait()


def wait_until_ready(process: "subprocess.Popen[bytes]", address: str, words: IO[str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            words.seek(0)
            last = words.read().strip().splitlines()[-3:]
            raise ServerStartError(f"the server ended with status {process.returncode}: {' '.join(last)}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{address}/ready", timeout=5).status_code == 200:
                return
        time.sleep(POLL_S)
    raise ServerStartError(f"the server was not ready after {START_TIMEOUT_S:.0f} s")


def served_folder(given: Path | None) -> Path:
    """The model to serve: the one that is given, or the default one."""
    if given is not None:
        return given
    from dijiang_model.conversion.default_model import ensure_default_model

    return ensure_default_model()
