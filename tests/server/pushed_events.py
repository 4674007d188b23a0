"""`generate` for engines of tests that have `submit`: a task for each request pushes its events."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from server.engine.types.requests import FinishReason, GenerationRequest, TokenEvent


class PushedEvents:
    """A base of engines."""

    def submit(self, request: GenerationRequest) -> AbstractAsyncContextManager[AsyncIterator[TokenEvent]]:
        raise NotImplementedError

    @asynccontextmanager
    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        on_event: Callable[[TokenEvent], None],
        on_begun: Callable[[str], None] = lambda request_id: None,
    ) -> AsyncIterator[Callable[[str], None]]:
        tasks: dict[str, asyncio.Task[None]] = {}

        async def push(request_id: str, stack: AsyncExitStack, events: AsyncIterator[TokenEvent]) -> None:
            async with stack:
                on_begun(request_id)
                async for event in events:
                    on_event(event)

        def abort(request_id: str) -> None:
            if not tasks[request_id].done():
                tasks[request_id].cancel()
                on_event(TokenEvent(request_id, finish_reason=FinishReason.ABORT))

        try:
            async with AsyncExitStack() as entered:
                streams = []
                for request in requests:
                    stack = await entered.enter_async_context(AsyncExitStack())
                    streams.append((stack, await stack.enter_async_context(self.submit(request))))
                entered.pop_all()
            for request, (stack, events) in zip(requests, streams, strict=True):
                tasks[request.request_id] = asyncio.create_task(push(request.request_id, stack, events))
            yield abort
        finally:
            for request_id in tasks:
                abort(request_id)
            await asyncio.gather(*tasks.values(), return_exceptions=True)
