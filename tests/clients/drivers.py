"""The two clients behind one face, so that every test of behaviour runs against both."""

import asyncio
from dataclasses import dataclass
from typing import Any, Protocol

from clients.client import AsyncClient, Client
from clients.types import Usage


@dataclass(frozen=True, slots=True)
class Streamed:
    """What a stream gave."""

    pieces: list[Any]
    usage: Usage | None
    finish_reason: str | None


class Driver(Protocol):
    """Calls a client's method by name."""

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The result of an ordinary method."""

    def stream(self, method: str, *args: Any, raw: bool = False, limit: int | None = None, **kwargs: Any) -> Streamed:
        """The texts (or raw chunks) of a streaming method; leaves the stream after `limit` of them."""


class SyncDriver:
    """`Client`."""

    def __init__(self, url: str, **kwargs: Any) -> None:
        self._url, self._kwargs = url, kwargs

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        with Client(self._url, **self._kwargs) as client:
            return getattr(client, method)(*args, **kwargs)

    def stream(self, method: str, *args: Any, raw: bool = False, limit: int | None = None, **kwargs: Any) -> Streamed:
        pieces: list[Any] = []
        with (
            Client(self._url, **self._kwargs) as client,
            getattr(client, method)(*args, **kwargs) as stream,
        ):
            for piece in stream if raw else stream.text_stream:
                pieces.append(piece)
                if len(pieces) == limit:
                    break
        return Streamed(pieces, stream.usage, stream.finish_reason)


class AsyncDriver:
    """`AsyncClient`, each call in an event loop of its own."""

    def __init__(self, url: str, **kwargs: Any) -> None:
        self._url, self._kwargs = url, kwargs

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(self._url, **self._kwargs) as client:
                return await getattr(client, method)(*args, **kwargs)

        return asyncio.run(run())

    def stream(self, method: str, *args: Any, raw: bool = False, limit: int | None = None, **kwargs: Any) -> Streamed:
        async def run() -> Streamed:
            pieces: list[Any] = []
            async with (
                AsyncClient(self._url, **self._kwargs) as client,
                getattr(client, method)(*args, **kwargs) as stream,
            ):
                async for piece in stream if raw else stream.text_stream:
                    pieces.append(piece)
                    if len(pieces) == limit:
                        break
            return Streamed(pieces, stream.usage, stream.finish_reason)

        return asyncio.run(run())
