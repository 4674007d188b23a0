"""Runs the commands of a page in a folder of its own, against the test's server."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx

from tests.docs.tables import ADDRESS, COLLECTED, EARLIER_STATE, SMALLER, TYPED
from tests.ports import free_port
from tests.test_layout import ROOT
from tests.waiting import PATIENCE_S, until

_PROGRAMS = {"dijiang": "-m server", "python": ""}
"""What stands in `.venv/bin`, and the options of this interpreter for it: the code at hand is what runs."""


class Shell:
    """A folder, and what the last command has said.

    It has a `.venv` with the programs that commands name, and the benchmarks, so that these can stand as they are.
    """

    def __init__(self, folder: Path, server_address: str, things: Mapping[str, Path]) -> None:
        self.folder = folder
        self.address = server_address
        self._things = things
        self._output = ""
        self._programs = programs = folder / ".venv" / "bin"
        programs.mkdir(parents=True)
        for name, options in _PROGRAMS.items():
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {options} "$@"\n')
            (programs / name).chmod(0o755)
        (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
        (folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
        self._environment = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTEST_ADDOPTS": "--collect-only -p no:cacheprovider",
            "CURL_HOME": str(folder),
            "DIJIANG_BASE_URL": f"http://{server_address}",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, command: str) -> None:
        """Fails the test unless the command ends well; a server is waited for and stopped."""
        command = self._adapted(command)
        if command.startswith("dijiang serve"):
            self._serve(command)
            return
        if re.search(COLLECTED, command):
            done = self._start(command.replace(".venv/bin/", f"{self._programs}/"), ROOT)
        else:
            done = self._start(command, self.folder)
        try:
            typed = next((lines for pattern, lines in TYPED.items() if re.search(pattern, command)), "")
            output, _ = done.communicate(typed.encode(), timeout=PATIENCE_S)
        finally:
            done.kill()
        self._output = output.decode(errors="replace")
        assert done.returncode == 0, f"{command}\nended with status {done.returncode}:\n{self._output}"

    def _adapted(self, command: str) -> str:
        command = re.sub(ADDRESS, self.address, command)
        if re.search(EARLIER_STATE, command):
            named = re.findall(r"state_[0-9a-f]{8,}", self._output)
            assert named, f"no state was named before\n{command}"
            command = re.sub(EARLIER_STATE, named[-1], command)
        for pattern, options in SMALLER.items():
            if re.match(rf"(\.venv/bin/)?{pattern}", command):
                command = f"{_without_comment(command)} {options.format_map(self._things)}"
        return command

    def _serve(self, command: str) -> None:
        port = free_port()
        process = self._start(f"exec {command} --port {port}", self.folder)
        try:
            until(lambda: process.poll() is not None or _is_ready(port))
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0, f"{command}\nended with {process.returncode}:\n{output.decode()}"
        finally:
            process.kill()

    def _start(self, command: str, folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["bash", "-euc", command],
            cwd=folder,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


def _without_comment(command: str) -> str:
    return shlex.join(shlex.split(command, comments=True))


def _is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=PATIENCE_S).status_code == 200
    except httpx.TransportError:
        return False
