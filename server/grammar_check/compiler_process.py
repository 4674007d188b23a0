"""One process that compiles grammars, as the service sees it: started when it is needed, and after it broke again."""

import asyncio
import contextlib
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from server.engine.types.requests import EngineInfo, GrammarSpec
from server.grammar_check.sources import GrammarSource

_log = logging.getLogger(__name__)
_START_TIMEOUT_S = 60.0
_MAX_LINE_BYTES = 64 << 20


class NoGrammarsError(Exception):
    """The model's tokenizer permits no grammar at all; the text is for clients."""


class _EndedError(Exception):
    """The process has gone in the middle of its work."""


class CompilerProcess:
    """See `server.grammar_check.worker`. Compiles one grammar at a time."""

    def __init__(self, model_folder: Path, module: str) -> None:
        """
        Args:
            model_folder: where the tokenizer is.
            module: run with `python -m`.
        """
        self._model_folder = model_folder
        self._module = module
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """The process; None while there is none."""
        return None if self._process is None else self._process.pid

    async def compile(self, source: GrammarSource, info: EngineInfo, *, timeout_s: float) -> GrammarSpec | str:
        """The grammar, or why it is refused.

        Raises:
            NoGrammarsError: every one would be.
        """
        process = await self._started(info)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await _exchange(process, asdict(source))
        except TimeoutError:
            await self.close()
            return f"compiling it takes longer than {timeout_s:g} s"
        except _EndedError:
            _log.warning("the process that compiles grammars has ended; another one is started when it is needed")
            await self.close()
            return "it is too large or nested too deeply to be compiled"
        except BaseException:  # cancelled: an answer that nobody took would be taken for the next one
            await self.close()
            raise
        return str(answer["error"]) if "error" in answer else GrammarSpec(str(answer["grammar"]))

    async def close(self) -> None:
        """Ends the process. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        # Its pipes are read to their end, so that nothing of it is left when the event loop closes.
        await process.communicate()

    async def _started(self, info: EngineInfo) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
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
                greeting = await _exchange(process, None)
        except BaseException:
            await self.close()
            raise
        if "error" in greeting:
            await self.close()
            raise NoGrammarsError(str(greeting["error"]))
        return process


async def _exchange(process: asyncio.subprocess.Process, request: dict[str, object] | None) -> dict[str, object]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if request is not None:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            await process.stdin.drain()
        line = await process.stdout.readline()
    except ConnectionError as error:
        raise _EndedError from error
    if not line.endswith(b"\n"):
        raise _EndedError
    answer: dict[str, object] = json.loads(line)
    return answer
