"""The loop that hosts an `Engine` in a process of its own: `python -m server.engine.process.main FOLDER`.

- One message to the service per step, for all sequences together.
- Blocks while there is nothing to do.
- Lives no longer than its parent: standard input is a pipe whose other end only the parent holds, and
  its end is the signal to go, whichever way the parent went.
- Ignores SIGINT and SIGTERM: those reach whole process groups, and it is for the parent to decide
  whether running requests are finished first.
- A fault that belongs to one request ends that request. Any other exception ends the process, with a
  line of JSON on standard error; the service restarts it.
"""

import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable

import msgspec
import zmq

from server.engine.engine import Engine
from server.engine.failures import EXIT_LOAD_FAILED, EXIT_STEP_FAILED, LineHandler, is_permanent, log_failure, reason_of
from server.engine.process.messages import (
    COMMANDS_SOCKET,
    EVENTS_SOCKET,
    AbortRequest,
    Alive,
    Begun,
    Command,
    EngineReady,
    Heartbeat,
    LoadFailed,
    Report,
    ResetCache,
    StepDone,
    SuspendRequest,
    ipc_address,
)
from server.engine.types.requests import EngineConfig, TokenEvent

STATS_INTERVAL_S = 1.0
_LINGER_MS = 2_000

Load = Callable[[EngineConfig], Engine]


class EngineLoop:
    """Moves commands into an engine and its events out."""

    def __init__(self, engine: Engine, *, commands: zmq.Socket[bytes], events: zmq.Socket[bytes]) -> None:
        self._engine = engine
        self._commands = commands
        self._events = events
        self._decoder = msgspec.msgpack.Decoder(Command)
        self._encoder = msgspec.msgpack.Encoder()
        self._next_stats_s = 0.0
        engine.on_begin = lambda request_ids: self._send(Begun(request_ids))

    def run_forever(self) -> None:
        """Turns until an exception ends it."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Takes all commands that are there (waits for one when idle), steps once, reports once."""
        was_idle = not self._engine.has_work
        events = self._take_commands(wait=was_idle)
        if self._engine.has_work:
            events += self._engine.step()
        now_idle = not self._engine.has_work
        # The last message before going idle carries the numbers too, or the gauges would stay up.
        wants_stats = now_idle or time.monotonic() >= self._next_stats_s
        if events or wants_stats:
            self._report(events, with_stats=wants_stats)

    def _take_commands(self, *, wait: bool) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        flags = 0 if wait else zmq.NOBLOCK
        while True:
            try:
                message = self._commands.recv(flags)
            except zmq.Again:
                return events
            flags = zmq.NOBLOCK
            events += self._obey(self._decoder.decode(message))

    def _obey(self, command: Command) -> list[TokenEvent]:
        if isinstance(command, SuspendRequest):
            return self._engine.suspend(
                command.request_id, save_to=command.save_to, note=command.note, in_prompt=command.in_prompt
            )
        if isinstance(command, ResetCache):
            self._engine.reset_cache()
            return []
        if isinstance(command, Heartbeat):
            self._send(Alive())
            return []
        if isinstance(command, AbortRequest):
            events = [self._engine.abort(command.request_id)]
        else:
            events = [self._engine.add(request) for request in command.whole()]
        return [event for event in events if event is not None]

    def _report(self, events: list[TokenEvent], *, with_stats: bool) -> None:
        stats = None
        if with_stats:
            stats = self._engine.stats
            self._next_stats_s = time.monotonic() + STATS_INTERVAL_S
        self._send(StepDone(events, stats))

    def _send(self, report: Report) -> None:
        self._events.send(self._encoder.encode(report))


def run(config: EngineConfig, folder: str, *, load: Load) -> int:
    """Loads, reports, serves; returns the exit status, for it only ends by failing."""
    context = zmq.Context()
    commands, events = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    try:
        for socket, name in ((commands, COMMANDS_SOCKET), (events, EVENTS_SOCKET)):
            socket.set_hwm(0)  # the service keeps up or grows; it must never hold up everybody's next token
            socket.setsockopt(zmq.LINGER, _LINGER_MS)
            socket.connect(ipc_address(folder, name))
        try:
            engine = load(config)
        except Exception as error:
            log_failure("engine_load_failed", error)
            _send(events, LoadFailed(reason_of(error), is_permanent=is_permanent(error)))
            return EXIT_LOAD_FAILED
        gc.freeze()  # what was loaded stays: full collections need not look at it again between two steps
        gc.enable()
        _send(events, EngineReady(engine.info))
        try:
            EngineLoop(engine, commands=commands, events=events).run_forever()
        except Exception as error:
            log_failure("engine_step_failed", error)
        return EXIT_STEP_FAILED
    finally:
        commands.close()
        events.close()
        context.term()


def load_engine(config: EngineConfig) -> Engine:
    """Loads the engine that a configuration asks for: in this process alone, or split over several.

    Raises:
        As `server.engine.loading.load_engine` and `server.engine.tensor_parallel.assemble.load_parallel_engine`.
    """
    # Imported here: a process whose torch is broken can still say so.
    if config.tensor_parallel > 1:
        from server.engine.tensor_parallel.assemble import load_parallel_engine

        return load_parallel_engine(config)
    from server.engine import loading

    return loading.load_engine(config)


def main(load: Load = load_engine) -> int:
    """Entry point of the process; the folder of the sockets is the only argument."""
    logging.basicConfig(handlers=[LineHandler()], level=logging.WARNING)
    gc.disable()  # until the model is loaded: imports make a million objects, none of them garbage
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    standard_input = sys.stdin.buffer
    config = msgspec.json.decode(standard_input.readline(), type=EngineConfig)
    folder = sys.argv[1]
    threading.Thread(target=_end_with_parent, args=(standard_input.fileno(), folder), daemon=True).start()
    return run(config, folder, load=load)


def _end_with_parent(standard_input: int, folder: str) -> None:
    """Reads the bare descriptor: a thread inside a Python file object would block the interpreter's exit."""
    while os.read(standard_input, 1):
        pass
    shutil.rmtree(folder, ignore_errors=True)  # which a parent that was killed could not remove
    if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():  # so are the ranks, even one that is stopped
        os.killpg(0, signal.SIGKILL)
    os._exit(0)  # at once, from whatever the main thread is doing


def _send(socket: zmq.Socket[bytes], report: Report) -> None:
    socket.send(msgspec.msgpack.encode(report))


if __name__ == "__main__":
    sys.exit(main())
