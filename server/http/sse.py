"""Server-sent events: framing, keep-alive comments, and a response that notices when its reader leaves."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
IN_TIME = 0.9
"""Share of the longest silence in a stream after which KEEP_ALIVE is sent: it takes some time to arrive."""
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
T = TypeVar("T")
_LINE_BREAKS = tuple((text.encode(), f"\\u{ord(text):04x}".encode()) for text in ("\x85", "\u2028", "\u2029"))


class ClientDisconnectedError(Exception):
    """Nobody is there any more to read the answer."""


def event(data: bytes) -> bytes:
    """One event of JSON in UTF-8, on one `data:` line.

    JSON has no raw line breaks, but it may hold characters that are no line breaks to the format and are to many
    clients, who read line by line with their language's own means; those are escaped.
    """
    for character, escape in _LINE_BREAKS:
        data = data.replace(character, escape)
    return b"data: " + data + b"\n\n"


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """Result of `work`; cancelled as soon as the client leaves.

    Raises:
        ClientDisconnectedError: the client left first.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnectedError
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStreamResponse(Response):
    """Streams `body`, and closes what is behind it in every case: end, error, or a reader that left."""

    def __init__(
        self, body: AsyncGenerator[bytes, None], *, close: Callable[[], Awaitable[None]], media_type: str | None = None
    ) -> None:
        """
        Args:
            close: awaited exactly once, also when not a byte was sent.
            media_type: of a dialect that streams in another form.
        """
        more = {} if media_type is None else {"content-type": media_type}
        super().__init__(status_code=200, headers=HEADERS | more)
        del self.headers["content-length"]
        self._chunks = body
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._stream(send))
        except (ClientDisconnectedError, OSError):
            pass  # the reader left; nothing can be told to it
        finally:
            await self._close()

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
