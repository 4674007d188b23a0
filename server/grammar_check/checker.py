"""Compiles the grammars of requests once, off the event loop, before anything is answered.

A grammar that takes too long, too much memory, or breaks the compiler is refused, and costs the process that compiles
(`server.grammar_check.worker`), which is started again for the next one. Several compile at once, in turns among keys:
nobody waits for another key's slow ones. What was found is remembered by the text, refusals too, and goes on
being found when the client who asked has left.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from server.engine.fairness.turns import Turns
from server.engine.types.requests import EngineInfo, GrammarSpec
from server.grammar_check.compiler_process import CompilerProcess, NoGrammarsError
from server.grammar_check.sources import GrammarSource

MAX_REMEMBERED = 256
NUM_PROCESSES = 3
_WORKER_MODULE = "server.grammar_check.worker"


class GrammarRefusedError(Exception):
    """The grammar cannot be used; the text is for the client who sent it."""


class GrammarsBusyError(Exception):
    """Too many grammars wait to be compiled."""


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What a grammar may cost.

    Attributes:
        max_bytes: size of its text.
        timeout_s: time to compile it.
        max_waiting: grammars that may be compiled or wait for that; of one key three quarters of them.
    """

    max_bytes: int = 256 << 10
    timeout_s: float = 5.0
    max_waiting: int = 64


class GrammarChecker:
    """See the module. Used on one event loop, by any number of tasks."""

    def __init__(
        self, model_folder: Path, limits: GrammarLimits | None = None, *, module: str = _WORKER_MODULE
    ) -> None:
        """
        Args:
            model_folder: where the tokenizer is.
            limits: the defaults if None.
            module: the process, run with `python -m`.
        """
        self._limits = GrammarLimits() if limits is None else limits
        self._remembered: OrderedDict[GrammarSource, GrammarSpec | str] = OrderedDict()
        self._tasks: dict[GrammarSource, asyncio.Task[None]] = {}
        self._turns: Turns[asyncio.Future[CompilerProcess]] = Turns(NUM_PROCESSES)
        self._idle = [CompilerProcess(model_folder, module) for _ in range(NUM_PROCESSES)]
        self._processes = tuple(self._idle)
        self._refusal: str | None = None

    @property
    def pids(self) -> frozenset[int]:
        """The processes there are."""
        return frozenset(process.pid for process in self._processes if process.pid is not None)

    async def check(self, source: GrammarSource, info: EngineInfo, *, key: str = "") -> GrammarSpec:
        """What the engine may be given.

        Args:
            source: as the client wrote it.
            info: of the engine.
            key: whose it is; keys take turns.

        Raises:
            GrammarRefusedError: it is not valid, or costs more than the limits allow.
            GrammarsBusyError: too many wait already.
        """
        size = len(source.text.encode("utf-8", "replace"))
        if size > self._limits.max_bytes:
            raise GrammarRefusedError(f"it has {size:,} bytes, the limit is {self._limits.max_bytes:,}")
        if self._refusal is not None:
            raise GrammarRefusedError(self._refusal)
        if source not in self._remembered:
            await asyncio.shield(self._tasks.get(source) or self._begin(source, info, key))
        self._remembered.move_to_end(source)
        found = self._remembered[source]
        if isinstance(found, str):
            raise GrammarRefusedError(found)
        return found

    async def reset(self) -> None:
        """Forgets what was compiled: the model has another tokenizer, perhaps."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self.close()
        self._remembered.clear()
        self._refusal = None

    async def close(self) -> None:
        """Ends the processes. May be called twice."""
        tasks = [*self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for process in self._processes:
            await process.close()

    def _begin(self, source: GrammarSource, info: EngineInfo, key: str) -> "asyncio.Task[None]":
        most_of_one = max(1, self._limits.max_waiting * 3 // 4)
        if len(self._tasks) >= self._limits.max_waiting or self._turns.num_of(key) >= most_of_one:
            raise GrammarsBusyError
        turn: asyncio.Future[CompilerProcess] = asyncio.get_running_loop().create_future()
        self._turns.add(key, turn)
        task = self._tasks[source] = asyncio.create_task(self._find(source, info, key, turn))
        self._start_next()
        return task

    async def _find(
        self, source: GrammarSource, info: EngineInfo, key: str, turn: "asyncio.Future[CompilerProcess]"
    ) -> None:
        try:
            process = await turn
            try:
                found = await process.compile(source, info, timeout_s=self._limits.timeout_s)
            except NoGrammarsError as error:
                self._refusal = found = str(error)
            finally:
                self._idle.append(process)
                self._turns.done(key)
                self._start_next()
            self._remembered[source] = found
            if len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        finally:
            self._turns.discard(turn)
            del self._tasks[source]

    def _start_next(self) -> None:
        while (job := self._turns.start()) is not None:
            key, turn = job
            if turn.cancelled():
                self._turns.done(key)
            else:
                turn.set_result(self._idle.pop())
