"""Compiles the grammars of requests once, off the event loop, before anything is answered.

A grammar that takes too long, too much memory, or breaks the compiler is refused, and costs the process that compiles
(`server.grammar_check.worker`), which is started again for the next one. Answers are remembered by the grammar's text.
"""

import asyncio
import contextlib
import json
import logging
import sys
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

from server.engine.types.requests import EngineInfo, GrammarSpec
from server.grammar_check.sources import GrammarSource

MAX_REMEMBERED = 256
_log = logging.getLogger(__name__)
_START_TIMEOUT_S = 60.0
_MAX_LINE_BYTES = 64 << 20
_WORKER_MODULE = "server.grammar_check.worker"


class GrammarRefusedError(Exception):
    """The grammar cannot be used; the text is for the client who sent it."""


class GrammarsBusyError(Exception):
    """Too many grammars wait to be compiled."""


class _WorkerEndedError(Exception):
    """The process has gone in the middle of its work."""


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What a grammar may cost.

    Attributes:
        max_bytes: size of its text.
        timeout_s: time to compile it.
        max_waiting: grammars that may wait for others.
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
        self._model_folder = model_folder
        self._limits = GrammarLimits() if limits is None else limits
        self._module = module
        self._remembered: OrderedDict[GrammarSource, GrammarSpec | str] = OrderedDict()
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._process: asyncio.subprocess.Process | None = None
        self._refusal: str | None = None

    @property
    def pid(self) -> int | None:
        """The process; None while there is none."""
        return None if self._process is None else self._process.pid

    async def check(self, source: GrammarSource, info: EngineInfo) -> GrammarSpec:
        """What the engine may be given.

        Raises:
            GrammarRefusedError: it is not valid, or costs more than the limits allow.
            GrammarsBusyError: too many wait already.
        """
        size = len(source.text.encode("utf-8", "replace"))
        if size > self._limits.max_bytes:
            raise GrammarRefusedError(f"it has {size:,} bytes, the limit is {self._limits.max_bytes:,}")
        if source not in self._remembered:
            if self._num_waiting >= self._limits.max_waiting:
                raise GrammarsBusyError
            self._num_waiting += 1
            try:
                async with self._turn:
                    if source not in self._remembered:
                        self._remember(source, await self._ask(source, info))
            finally:
                self._num_waiting -= 1
        self._remembered.move_to_end(source)
        found = self._remembered[source]
        if isinstance(found, str):
            raise GrammarRefusedError(found)
        return found

    async def reset(self) -> None:
        """Forgets what was compiled: the model has another tokenizer, perhaps."""
        async with self._turn:
            await self.close()
            self._remembered.clear()
            self._refusal = None

    async def close(self) -> None:
        """Ends the process. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        # Its pipes are read to their end, so that nothing of it is left when the event loop closes.
        await process.communicate()

    def _remember(self, source: GrammarSource, found: GrammarSpec | str) -> None:
        self._remembered[source] = found
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    async def _ask(self, source: GrammarSource, info: EngineInfo) -> GrammarSpec | str:
        """The grammar, or why it is refused."""
        if self._refusal is None:
            await self._start(info)
        if self._refusal is not None:
            return self._refusal
        process = self._process
        assert process is not None
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                answer = await self._exchange(process, asdict(source))
        except TimeoutError:
            await self.close()
            return f"compiling it takes longer than {self._limits.timeout_s:g} s"
        except _WorkerEndedError:
            _log.warning("the process that compiles grammars has ended; another one is started when it is needed")
            await self.close()
            return "it is too large or nested too deeply to be compiled"
        except BaseException:  # cancelled: an answer that nobody took would be taken for the next one
            await self.close()
            raise
        return str(answer["error"]) if "error" in answer else GrammarSpec(str(answer["grammar"]))

    async def _start(self, info: EngineInfo) -> None:
        """Has the process running, unless no grammar can be used at all."""
        if self._process is not None and self._process.returncode is None:
            return
        await self.close()
        eos = ",".join(map(str, info.eos_token_ids))
        self._process = process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", self._module, str(self._model_folder), str(info.vocab_size), eos),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # a compiler that breaks may repeat what clients wrote
            limit=_MAX_LINE_BYTES,
            start_new_session=True,  # a Ctrl-C at the terminal is for the service to handle
        )
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                greeting = await self._exchange(process, None)
        except BaseException:
            await self.close()
            raise
        if "error" in greeting:
            self._refusal = str(greeting["error"])
            await self.close()

    @staticmethod
    async def _exchange(process: asyncio.subprocess.Process, request: dict[str, object] | None) -> dict[str, object]:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if request is not None:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                await process.stdin.drain()
            line = await process.stdout.readline()
        except ConnectionError as error:
            raise _WorkerEndedError from error
        if not line.endswith(b"\n"):
            raise _WorkerEndedError
        answer: dict[str, object] = json.loads(line)
        return answer
