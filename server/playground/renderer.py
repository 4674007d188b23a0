"""Renders Markdown in a process of its own, started when a page first asks, and again after a text has broken it."""

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable

from server.errors import InvalidRequestError, OverloadedError

MAX_WAITING = 32
START_TIMEOUT_S = 30.0
_MODULE = "server.playground.worker"


class Renderer:
    """Used on one event loop, by any number of tasks.

    Attributes:
        timeout_s: how long one text may take; a process that takes longer is ended.
    """

    def __init__(self, *, timeout_s: float = 2.0) -> None:
        self.timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None
        self._turn = asyncio.Lock()
        self._num_waiting = 0

    @property
    def pid(self) -> int | None:
        """The process; None while there is none."""
        return None if self._process is None else self._process.pid

    async def render(self, text: str) -> bytes:
        """Returns JSON, the fields of a `server.playground.markdown.Rendered`.

        Raises:
            InvalidRequestError: rendering takes too long, or too much memory.
            OverloadedError: too many texts wait.
        """
        if self._num_waiting >= MAX_WAITING:
            raise OverloadedError(f"{MAX_WAITING} texts wait to be rendered; try again in a second")
        self._num_waiting += 1
        try:
            async with self._turn:
                return await asyncio.to_thread(self._exchange, text)
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        """Ends the process. May be called twice."""
        self._process = None
        self._end()

    def _exchange(self, text: str) -> bytes:
        if self._process is None:
            self._start()
            self._ask("", START_TIMEOUT_S)
        return self._ask(text, self.timeout_s)

    def _start(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603
            (sys.executable, "-m", _MODULE),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a lexer that breaks may repeat what somebody wrote
            start_new_session=True,  # a Ctrl-C at the terminal is for the service to handle
        )
        self._end = weakref.finalize(self, _end, self._process)

    def _ask(self, text: str, timeout_s: float) -> bytes:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        limit = threading.Timer(timeout_s, process.kill)
        limit.start()
        line = b""
        try:
            with contextlib.suppress(OSError):  # it has gone
                process.stdin.write(json.dumps(text).encode() + b"\n")
                process.stdin.flush()
                line = process.stdout.readline()
        finally:
            limit.cancel()
        if not line.endswith(b"\n"):
            self.close()
            raise InvalidRequestError("this text is too hard to render: show it as it is", param="text")
        return line


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):  # what is left in it goes nowhere
            pipe.close()
