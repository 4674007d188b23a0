"""A process that compiles grammars for the service: `python -m server.grammar_check.worker FOLDER VOCAB_SIZE EOS,EOS`.

A grammar can take unbounded time or memory, or break the compiler; here that costs a process that holds nothing.
Requests come as lines of JSON on standard input, the fields of a `GrammarSource`; each is answered by one line on
standard output, `{"grammar": text}` or `{"error": sentence}`. The first line says `{"ready": true}`, or the error with
which every grammar would be refused. The end of standard input is the end of the process.
"""

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil

from server.engine.grammars.grammar import HEADER, GrammarCompiler, GrammarError
from server.grammar_check.sources import GrammarKind, GrammarSource, Lead, SourceError, translate

_STACK_BYTES = 1 << 20
"""Less than the engine has: what is nested too deeply breaks here and not there."""
_MAX_MORE_BYTES = 1 << 30
"""Memory that compiling may take."""


def main() -> None:
    """Answers until there is nothing more to read."""
    folder, vocab_size, eos_token_ids = sys.argv[1:]
    eos = tuple(int(token_id) for token_id in eos_token_ids.split(",") if token_id)
    try:
        compiler = GrammarCompiler.load(Path(folder), vocab_size=int(vocab_size), eos_token_ids=eos)
    except GrammarError as error:
        _say(error=str(error))
        return
    _limit_memory()
    _say(ready=True)
    threading.stack_size(_STACK_BYTES)
    answering = threading.Thread(target=_answer_all, args=(compiler,))
    answering.start()
    answering.join()


def answer(compiler: GrammarCompiler, line: str) -> dict[str, str]:
    """One line's answer."""
    request = json.loads(line)
    kinds = {"kind": GrammarKind(request["kind"]), "lead": Lead(request["lead"])}
    source = GrammarSource(**{**request, **kinds})
    answered = _compiled(compiler, source)
    if "error" in answered and source.lead is not Lead.NOTHING:
        # The client's own lines are what the error is to count.
        alone = _compiled(compiler, replace(source, lead=Lead.NOTHING))
        return alone if "error" in alone else answered
    return answered


def _compiled(compiler: GrammarCompiler, source: GrammarSource) -> dict[str, str]:
    try:
        grammar = HEADER + translate(source)
        compiler.compile(grammar)
    except (GrammarError, SourceError) as error:
        return {"error": str(error)}
    return {"grammar": grammar}


def _answer_all(compiler: GrammarCompiler) -> None:
    for line in sys.stdin:
        _say(**answer(compiler, line))


def _say(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not made for Windows
        return
    limit = psutil.Process().memory_info().vms + _MAX_MORE_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


if __name__ == "__main__":
    main()
