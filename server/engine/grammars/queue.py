"""Grammars of requests, compiled beside the steps: a request is scheduled once its grammar is there.

Compiling takes milliseconds, or a second for the largest grammar that the service lets through, and happens on
a thread of its own; llguidance gives the interpreter lock back meanwhile. Compiled grammars are kept by their
text, so the next request with the same one does not wait.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from server.engine.grammars.grammar import GrammarCompiler, GrammarError
from server.engine.sequence import Sequence
from server.engine.types.requests import EngineError, FinishReason, GenerationRequest, GrammarSpec, TokenEvent

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_CACHED = 128
_STACK_BYTES = 16 << 20
"""More than the service compiles with: what had room there has room here."""
_log = logging.getLogger(__name__)


class GrammarQueue:
    """See the module. Used by one thread, the engine's."""

    def __init__(self, load: Callable[[], GrammarCompiler], *, max_cached: int = MAX_CACHED) -> None:
        """
        Args:
            load: builds the compiler; called once, for the first grammar, on the compiling thread.
            max_cached: compiled grammars that are kept.
        """
        self._load = load
        self._compiler: Future[GrammarCompiler] | None = None
        self._max_cached = max_cached
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._waiting: dict[str, tuple[GenerationRequest, Future[LLMatcher]]] = {}
        self._under_way: dict[str, Future[LLMatcher]] = {}
        previous = threading.stack_size(_STACK_BYTES)
        try:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
            self._thread.submit(int)  # starts the thread while the size of its stack is set
        finally:
            threading.stack_size(previous)

    @property
    def is_busy(self) -> bool:
        """Whether a request waits for its grammar."""
        return bool(self._waiting)

    def owns(self, request_id: str) -> bool:
        """Whether this request waits for its grammar."""
        return request_id in self._waiting

    def take(self, request: GenerationRequest) -> bool:
        """Keeps a request until its grammar is compiled; False if there is nothing to wait for."""
        grammar = request.grammar
        if grammar is None or grammar.text in self._compiled:
            return False
        if self._compiler is None:
            self._compiler = self._thread.submit(self._load)
        future = self._under_way.get(grammar.text)
        if future is None:
            future = self._under_way[grammar.text] = self._thread.submit(self._compile, grammar)
        self._waiting[request.request_id] = (request, future)
        return True

    def cancel(self, request_id: str) -> bool:
        """Forgets a request that waits; False if it does not."""
        return self._waiting.pop(request_id, None) is not None

    def wait(self, timeout_s: float) -> None:
        """Until a grammar is compiled, or the time is over."""
        wait([future for _, future in self._waiting.values()], timeout_s, return_when=FIRST_COMPLETED)

    def arrived(self) -> tuple[list[GenerationRequest], list[TokenEvent]]:
        """Requests whose grammar is compiled now; terminal events of those whose grammar cannot be used."""
        for text in [text for text, future in self._under_way.items() if future.done()]:
            future = self._under_way.pop(text)
            if future.exception() is None:
                self._keep(text, future.result())
        requests, events = [], []
        for request, future in [item for item in self._waiting.values() if item[1].done()]:
            del self._waiting[request.request_id]
            error = future.exception()
            if error is None:
                requests.append(request)
            else:
                events.append(_failed(request.request_id, error))
        return requests, events

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
        assert self._compiler is not None
        sequence.constraint = self._compiler.result().constraint(matcher)
        if (resumed := sequence.request.resumed) is not None:
            prompt = sequence.request.prompt_token_ids
            for token_id in prompt[len(prompt) - resumed.num_outputs :]:
                sequence.constraint.accept(token_id)

    def close(self) -> None:
        """Ends the thread; nothing may wait any more."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _compile(self, grammar: GrammarSpec) -> "LLMatcher":
        assert self._compiler is not None
        return self._compiler.result().compile(grammar.text)

    def _keep(self, text: str, matcher: "LLMatcher") -> None:
        self._compiled[text] = matcher
        self._compiled.move_to_end(text)
        if len(self._compiled) > self._max_cached:
            self._compiled.popitem(last=False)


def _failed(request_id: str, error: BaseException) -> TokenEvent:
    if not isinstance(error, GrammarError):
        _log.error("a grammar could not be compiled", exc_info=error)
        problem = EngineError("internal_error", "the grammar of this request could not be compiled")
    else:
        problem = EngineError("grammar_invalid", f"the grammar of this request cannot be used: {error}")
    return TokenEvent(request_id, finish_reason=FinishReason.ERROR, error=problem)
