"""An engine without a model: it answers from a script, and can be held, broken and refused."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from server.engine.types.requests import (
    EngineError,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationRequest,
    TokenEvent,
)
from server.engine_client.submissions import TenantLoad
from server.errors import EngineUnavailableError, OverloadedError
from tests.server.pushed_events import PushedEvents

BYTE_VOCAB_SIZE, EOS_TOKEN_ID = 260, 258
"""Of `tests.byte_tokenizer`."""
ANSWER = "The capital of France is Paris, naïvely: 東京 no. 😀!"
Script = Callable[[GenerationRequest], Iterable[int]]


def answer_tokens(_: GenerationRequest) -> list[int]:
    """The standard answer, byte by byte, and the end of the sequence."""
    return [*ANSWER.encode(), EOS_TOKEN_ID]


@dataclass
class FakeEngine(PushedEvents):
    """Everything a test may set or look at.

    Attributes:
        script: tokens of a request; an end-of-sequence token in them ends it.
        tokens_per_event: how many tokens come at once.
        hold_after: events after which a request waits until it is aborted, or `gate` opens.
        fail_after: tokens after which a request ends with `error`.
        capacity: requests at once; more are refused.
        closed: set by `close`.
        submitted / ended: request ids, and why each one ended.
        orders: `reset_cache` and `reload`, as they came.
        suspended: request ids that were; they end without a state.
    """

    script: Script = answer_tokens
    tokens_per_event: int = 1
    hold_after: int | None = None
    fail_after: int | None = None
    error: EngineError = field(default_factory=lambda: EngineError("engine_restarting", "the engine died"))
    capacity: int = 1000
    status: str = "ready"
    num_restarts: int = 0
    submitted: list[GenerationRequest] = field(default_factory=list)
    ended: dict[str, FinishReason] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    gate: threading.Event | None = None
    closed: threading.Event = field(default_factory=threading.Event)
    orders: list[str] = field(default_factory=list)
    suspended: set[str] = field(default_factory=set)

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            num_slots=8,
            state_bytes_per_slot=4096,
            vocab_size=BYTE_VOCAB_SIZE,
            eos_token_ids=(EOS_TOKEN_ID,),
            device="cpu",
            device_name="fake",
            weights_dtype="float32",
            num_parameters=1,
            load_s=0.1,
            kv_cache_bytes_per_token=96,
        )

    @property
    def stats(self) -> EngineStats:
        return EngineStats(len(self.running), 0, 8 - len(self.running), 7, 6, 5, 0.5)

    @property
    def loads(self) -> dict[str, TenantLoad]:
        return {"everybody": TenantLoad(len(self.running), 0)}

    async def close(self) -> None:
        """Ends what runs with ABORT."""
        self.status = "stopped"
        self.closed.set()

    def suspend(self, request_id: str, *, save_to: str | None, note: str, in_prompt: bool) -> None:
        self.suspended.add(request_id)

    def reset_cache(self) -> None:
        self.orders.append("reset_cache")

    async def reload(self, until_idle: Callable[[], Awaitable[None]], *, beside: bool = True) -> EngineInfo:
        await until_idle()
        self.orders.append("reload")
        return self.info

    @asynccontextmanager
    async def submit(self, request: GenerationRequest) -> AsyncIterator[AsyncIterator[TokenEvent]]:
        if self.status != "ready":
            raise EngineUnavailableError(f"the engine is {self.status}")
        if len(self.running) >= self.capacity:
            raise OverloadedError("at capacity")
        self.submitted.append(request)
        self.running.add(request.request_id)
        try:
            yield self._events(request)
        finally:
            self.running.discard(request.request_id)
            self.ended.setdefault(request.request_id, FinishReason.ABORT)

    async def _events(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        for number, event in enumerate(self._plan(request)):
            if number == self.hold_after:
                await self._released(request.request_id)
            if request.request_id in self.suspended:
                self.ended[request.request_id] = FinishReason.SUSPENDED
                yield TokenEvent(request.request_id, finish_reason=FinishReason.SUSPENDED)
                return
            if self.closed.is_set():
                self.ended[request.request_id] = FinishReason.ABORT
                yield TokenEvent(request.request_id, finish_reason=FinishReason.ABORT)
                return
            await asyncio.sleep(0)
            if event.finish_reason is not None:
                self.ended[request.request_id] = event.finish_reason
            yield event

    async def _released(self, request_id: str) -> None:
        """Until the gate opens, the request is suspended, or the engine is closed."""
        while not (self.closed.is_set() or (self.gate is not None and self.gate.is_set())):
            if request_id in self.suspended:
                return
            await asyncio.sleep(0.01)

    def _plan(self, request: GenerationRequest) -> list[TokenEvent]:
        token_ids, reason = self._tokens(request)
        batches = [
            tuple(token_ids[begin : begin + self.tokens_per_event])
            for begin in range(0, len(token_ids), self.tokens_per_event)
        ]
        events = [TokenEvent(request.request_id, batch) for batch in batches[:-1]]
        error = self.error if reason is FinishReason.ERROR else None
        last = batches[-1] if batches else ()
        return [*events, TokenEvent(request.request_id, last, finish_reason=reason, error=error)]

    def _tokens(self, request: GenerationRequest) -> tuple[list[int], FinishReason]:
        sampling = request.sampling
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS_TOKEN_ID})
        taken: list[int] = []
        for token_id in self.script(request):
            if len(taken) == self.fail_after:
                return taken, FinishReason.ERROR
            taken.append(token_id)
            if token_id in ends and len(taken) > sampling.min_tokens:
                return taken, FinishReason.STOP
            if len(taken) == sampling.max_tokens:
                break
        return taken, FinishReason.LENGTH
