"""The service's side of a real engine on a tiny model, stepped on the event loop instead of in a process of its own."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from dijiang_model.serving.network import FrozenModel
from server.engine.loading import build_engine
from server.engine.types.requests import (
    EngineConfig,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationRequest,
    TokenEvent,
)
from tests.server.pushed_events import PushedEvents


class TinyEngine(PushedEvents):
    """Steps whenever one of its requests waits for an event.

    Attributes:
        submitted: every request so far.
    """

    status = "ready"
    num_restarts = 0

    def __init__(self, model: FrozenModel, folder: str, **config: object) -> None:
        values = {
            "model_path": folder,
            "device": "cpu",
            "weights_dtype": "float32",
            "num_threads": 1,
            "state_memory_bytes": 1 << 26,
            "max_num_slots": 4,
            "max_step_tokens": 16,
            "max_waiting": 100,
            **config,
        }
        self.engine = build_engine(model, EngineConfig(**values))  # type: ignore[arg-type]
        self.submitted: list[GenerationRequest] = []
        self._queues: dict[str, asyncio.Queue[TokenEvent]] = {}

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats

    async def close(self) -> None:
        """Nothing to end."""

    def suspend(self, request_id: str, *, save_to: str | None, note: str, in_prompt: bool) -> None:
        for event in self.engine.suspend(request_id, save_to=save_to, note=note, in_prompt=in_prompt):
            self._queues[event.request_id].put_nowait(event)

    def reset_cache(self) -> None:
        self.engine.reset_cache()

    async def reload(self, until_idle: Callable[[], Awaitable[None]], *, beside: bool = True) -> EngineInfo:
        """The model is in memory."""
        await until_idle()
        return self.info

    @asynccontextmanager
    async def submit(self, request: GenerationRequest) -> AsyncIterator[AsyncIterator[TokenEvent]]:
        self.submitted.append(request)
        self._queues[request.request_id] = asyncio.Queue()
        refused = self.engine.add(request)
        if refused is not None:
            self._queues[request.request_id].put_nowait(refused)
        try:
            yield self._events(request.request_id)
        finally:
            self.engine.abort(request.request_id)
            del self._queues[request.request_id]

    async def _events(self, request_id: str) -> AsyncIterator[TokenEvent]:
        queue = self._queues[request_id]
        while True:
            while queue.empty():
                for event in self.engine.step():
                    if event.request_id in self._queues:
                        self._queues[event.request_id].put_nowait(event)
                await asyncio.sleep(0)
            event = queue.get_nowait()
            yield event
            if event.finish_reason is not None:
                assert event.finish_reason is not FinishReason.ABORT
                return
