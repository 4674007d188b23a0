"""Grammars of requests, compiled beside the steps: a request is scheduled once its grammar is there.

Compiling takes milliseconds, or a second for the largest grammar that the service lets through, and happens on
threads of its own, in turns among tenants; llguidance gives the interpreter lock back meanwhile. Compiled grammars are
kept by their text, so the next request with the same one does not wait.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cached_property
from typing import TYPE_CHECKING

from server.engine.fairness.turns import Turns
from server.engine.grammars.grammar import GrammarCompiler, GrammarError
from server.engine.sequence import Sequence
from server.engine.stages import Prepared, failed
from server.engine.types.requests import EngineError, GenerationRequest, GrammarSpec, TokenEvent

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_CACHED = 128
NUM_THREADS = 2
_STACK_BYTES = 16 << 20
"""More than the service compiles with: what had room there has room here."""
_log = logging.getLogger(__name__)


class GrammarQueue:
    """The stage at which requests wait for their grammar. Used by one thread, the engine's."""

    def __init__(self, load: Callable[[], GrammarCompiler], *, max_cached: int = MAX_CACHED) -> None:
        """
        Args:
            load: builds the compiler; called once, for the first grammar, on the compiling thread.
            max_cached: compiled grammars that are kept.
        """
        self._load = load
        self._max_cached = max_cached
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._waiting: dict[str, tuple[GenerationRequest, GrammarSpec]] = {}
        self._turns: Turns[GrammarSpec] = Turns(NUM_THREADS)
        self._known: dict[GrammarSpec, Future[LLMatcher] | None] = {}
        self._keys: dict[GrammarSpec, str] = {}
        previous = threading.stack_size(_STACK_BYTES)
        try:
            self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammars")
            all_there = threading.Barrier(NUM_THREADS)
            for _ in range(NUM_THREADS):  # starts the threads while the size of their stacks is set
                self._threads.submit(all_there.wait)
        finally:
            threading.stack_size(previous)

    @cached_property
    def _compiler(self) -> Future[GrammarCompiler]:
        """Is loaded when it is first asked for, on a thread; grammars that are compiled on others wait for it."""
        return self._threads.submit(self._load)

    @property
    def is_busy(self) -> bool:
        """Whether a request waits for its grammar."""
        return bool(self._waiting)

    def owns(self, request_id: str) -> bool:
        """Whether this request waits for its grammar."""
        return request_id in self._waiting

    def enter(self, request: GenerationRequest) -> Prepared | None:
        """Keeps a request until its grammar is compiled."""
        grammar = request.grammar
        if grammar is None or grammar.text in self._compiled:
            return Prepared(request)
        self._compiler  # noqa: B018 (loaded before anything is compiled)
        self._waiting[request.request_id] = (request, grammar)
        if grammar not in self._known:
            self._known[grammar] = None
            self._turns.add(request.tenant.name, grammar)
            self._start_next()
        return None

    def cancel(self, request_id: str) -> bool:
        """Forgets a request that waits; False if it does not."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is None:
            return False
        grammar = waiting[1]
        if self._known[grammar] is None and not any(other == grammar for _, other in self._waiting.values()):
            self._turns.discard(grammar)
            del self._known[grammar]
        return True

    def wait(self, timeout_s: float) -> None:
        """Until a grammar is compiled, or the time is over."""
        wait([future for future in self._known.values() if future], timeout_s, return_when=FIRST_COMPLETED)

    def arrived(self) -> tuple[list[Prepared], list[TokenEvent]]:
        """Requests whose grammar is compiled now; terminal events of those whose grammar cannot be used."""
        prepared, events = [], []
        for grammar, future in [*self._known.items()]:
            if future is None or not future.done():
                continue
            del self._known[grammar]
            self._turns.done(self._keys.pop(grammar))
            error = future.exception()
            if error is None:
                self._keep(grammar.text, future.result())
            for request in [request for request, wanted in self._waiting.values() if wanted == grammar]:
                del self._waiting[request.request_id]
                if error is None:
                    prepared.append(Prepared(request))
                else:
                    events.append(failed(request.request_id, _refusal(error)))
        self._start_next()
        return prepared, events

    def _start_next(self) -> None:
        while (job := self._turns.start()) is not None:
            key, grammar = job
            self._keys[grammar] = key
            self._known[grammar] = self._threads.submit(self._compile, grammar)

    def begin(self, sequence: Sequence) -> None:
        """Gives a sequence that is admitted its constraint, if its request has a grammar."""
        grammar = sequence.request.grammar
        if grammar is None:
            return
        matcher = self._compiled.get(grammar.text)
        if matcher is None:  # it waited for a slot so long that others took the place of its grammar
            matcher = self._compile(grammar)
            self._keep(grammar.text, matcher)
        else:
            self._compiled.move_to_end(grammar.text)
        sequence.constraint = self._compiler.result().constraint(matcher)
        if (resumed := sequence.request.resumed) is not None:
            prompt = sequence.request.prompt_token_ids
            for token_id in prompt[len(prompt) - resumed.num_outputs :]:
                sequence.constraint.accept(token_id)

    def close(self) -> None:
        """Ends the threads; nothing may wait any more."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _compile(self, grammar: GrammarSpec) -> "LLMatcher":
        return self._compiler.result().compile(grammar.text)

    def _keep(self, text: str, matcher: "LLMatcher") -> None:
        self._compiled[text] = matcher
        self._compiled.move_to_end(text)
        if len(self._compiled) > self._max_cached:
            self._compiled.popitem(last=False)


def _refusal(error: BaseException) -> EngineError:
    if isinstance(error, GrammarError):
        return EngineError("grammar_invalid", f"the grammar of this request cannot be used: {error}")
    _log.error("a grammar could not be compiled", exc_info=error)
    return EngineError("internal_error", "the grammar of this request could not be compiled")
