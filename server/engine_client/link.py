"""One engine process as its parent sees it: started, talked to, ended. Its successor gets a new link."""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace

import msgspec
import zmq

from server.engine.process.messages import COMMANDS_SOCKET, EVENTS_SOCKET, Command, Report, ipc_address
from server.engine.types.requests import EngineConfig

_DRAIN_S = 0.05
_REPORTS_A_TURN = 8
"""Then everybody else on the event loop has a turn: an engine with a small model may send faster than they read."""
_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**29),
    "MALLOC_TRIM_THRESHOLD_": str(2**29),
    "OMP_WAIT_POLICY": "passive",
}
"""What the operator's environment does not say.

MALLOC_*: glibc keeps freed memory. A step's tensors are of the same sizes as the last one's, and getting their pages
from the system anew took more than half of the sampling time on a CPU.
OMP_*: torch's threads sleep as soon as they have nothing to do. Those that sampling woke used to spin for milliseconds,
on a core that the next step's compiled kernels were waiting for: 4 of 21 ms with two threads on two cores.
"""


class EngineEndedError(Exception):
    """The engine process is not there to take a command."""


class EngineLink:
    """A running engine process and the two sockets to it, in a folder that only this user may enter.

    Commands go out through one socket, at once and in order; reports come in through another one, whose descriptor the
    event loop watches. (`zmq.asyncio` would do that too; it took a third of the service's time for a token.)
    """

    def __init__(self, folder: str) -> None:
        """`open` is the way to make one; `folder` is its own, and goes with it."""
        self._folder = folder
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._commands = self._context.socket(zmq.PUSH)
        self._events = self._context.socket(zmq.PULL)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Report)
        self._process: asyncio.subprocess.Process | None = None

    @classmethod
    async def open(cls, config: EngineConfig, *, module: str) -> "EngineLink":
        """Starts an engine process; it goes on loading after the return.

        Args:
            config: what the engine gets.
            module: run with `python -m`; see `server.engine.process.main`.

        Raises:
            OSError: no process can be started.
            zmq.ZMQError: the sockets cannot be made (a temporary folder with too long a name, say).
        """
        link = cls(tempfile.mkdtemp(prefix="dijiang-"))  # mode 0700
        try:
            link._bind()
            await link._start(replace(config, scratch_folder=link._folder), module)
        except BaseException:
            await link.close()
            raise
        return link

    @property
    def pid(self) -> int | None:
        """The process; None before it was started."""
        return None if self._process is None else self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return None if self._process is None else self._process.returncode

    def send(self, command: Command) -> None:
        """Hands a command over, without waiting.

        Raises:
            EngineEndedError: the process has gone.
        """
        try:
            self._commands.send(self._encoder.encode(command), zmq.NOBLOCK)
        except zmq.Again as error:
            raise EngineEndedError from error

    async def reports(self) -> AsyncIterator[Report]:
        """Everything the engine says, until its process has ended."""
        assert self._process is not None
        loop, descriptor, stirred = asyncio.get_running_loop(), self._events.getsockopt(zmq.FD), asyncio.Event()
        assert isinstance(descriptor, int)
        ended = asyncio.ensure_future(self._process.wait())
        ended.add_done_callback(lambda _: stirred.set())
        loop.add_reader(descriptor, stirred.set)
        try:
            while not ended.done():
                stirred.clear()  # before looking: the descriptor tells of changes only
                for number, report in enumerate(self._arrived(), 1):
                    yield report
                    if number % _REPORTS_A_TURN == 0:
                        await asyncio.sleep(0)
                await stirred.wait()
            # Its last words, sent just before it ended, may still be on their way.
            with suppress(TimeoutError):
                while True:
                    stirred.clear()
                    for report in self._arrived():
                        yield report
                    await asyncio.wait_for(stirred.wait(), _DRAIN_S)
        finally:
            loop.remove_reader(descriptor)
            ended.cancel()

    def _arrived(self) -> Iterator[Report]:
        """What has come in by now."""
        with suppress(zmq.Again):
            while True:
                yield self._decoder.decode(self._events.recv(zmq.NOBLOCK))

    def kill(self) -> None:
        """Ends the process and its ranks at once, even stopped ones, without waiting; they hold nothing to put away."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                if hasattr(os, "killpg"):
                    os.killpg(self._process.pid, signal.SIGKILL)  # it leads a group of its own, see `_start`
                else:
                    self._process.kill()

    async def close(self) -> None:
        """Ends the process and removes the sockets."""
        try:
            await self._end_process()
        finally:
            self._commands.close()
            self._events.close()
            self._context.term()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _bind(self) -> None:
        for socket, name in ((self._commands, COMMANDS_SOCKET), (self._events, EVENTS_SOCKET)):
            socket.set_hwm(0)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(ipc_address(self._folder, name))

    async def _start(self, config: EngineConfig, module: str) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            self._folder,
            stdin=asyncio.subprocess.PIPE,
            env={**_ENVIRONMENT, **os.environ},
            start_new_session=True,  # a Ctrl-C at the terminal is for the parent to handle
        )
        standard_input = self._process.stdin
        assert standard_input is not None
        standard_input.write(msgspec.json.encode(config) + b"\n")
        try:
            await standard_input.drain()
        except ConnectionError:
            return  # ended already; `reports` will say so

    async def _end_process(self) -> None:
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        self.kill()
        await self._process.wait()
