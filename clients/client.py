"""`Client` and `AsyncClient`: typed access to this server, or to any OpenAI-style one.

    client = Client("http://127.0.0.1:8000", model="smollm2-135m-dijiang")
    with client.stream_chat([{"role": "user", "content": "Hello"}]) as stream:
        for text in stream.text_stream:
            ...

Both make the same requests (`clients.calls`) and the same retries (`clients.exchange`); they differ in
who waits. Their methods raise `clients.errors.ClientError`.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import httpx

from clients import calls
from clients.calls import FILE_MEDIA_TYPE, Call
from clients.errors import APIConnectionError, OverloadedError
from clients.exchange import DEFAULT_MAX_RETRIES, Outcome, Step, exchange, translated_transport_errors
from clients.streaming import AsyncStream, Chunk, Stream
from clients.types import ChatChunk, ChatCompletion, Completion, GenerationOptions, Health, Message, Model, Prompt

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
LIMITS = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
FILE_HEADERS = {"content-type": FILE_MEDIA_TYPE}
HttpT = TypeVar("HttpT", httpx.Client, httpx.AsyncClient)
ResultT = TypeVar("ResultT")
ChunkT = TypeVar("ChunkT", bound=Chunk)


class _BaseClient(ABC, Generic[HttpT]):
    """What does not depend on who waits: the address, the key, the default model, the retries."""

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        model: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: httpx.Timeout | float = DEFAULT_TIMEOUT,
        max_retries: int = DEFAULT_MAX_RETRIES,
    ) -> None:
        """Opens no connection yet.

        Args:
            base_url: with or without `/v1`.
            api_key: sent as bearer token; None sends none.
            model: used by calls that name none.
            headers: sent with every request, besides the client's own.
            timeout: seconds of silence (not of the whole answer) after which a request fails.
            max_retries: how often a failed request is sent again, >= 0.

        Raises:
            ValueError: `base_url` is no http(s) URL, or `max_retries` is negative.
        """
        if max_retries < 0:
            raise ValueError(f"max_retries must be 0 or more, not {max_retries}")
        self.root = calls.server_root(base_url)
        self.default_model = model
        self.max_retries = max_retries
        all_headers = dict(headers) if headers is not None else {}
        if api_key is not None:
            all_headers["authorization"] = f"Bearer {api_key}"
        self._http: HttpT = self._open(all_headers, httpx.Timeout(timeout))

    @abstractmethod
    def _open(self, headers: dict[str, str], timeout: httpx.Timeout) -> HttpT:
        """The connection pool."""

    def _model(self, model: str | None) -> str:
        name = model if model is not None else self.default_model
        if name is None:
            raise ValueError("name a model, in the call or when the client is made; `models()` lists them")
        return name

    def _request(self, call: Call[Any]) -> httpx.Request:
        url = self.root + call.path
        if call.content is None:
            return self._http.build_request(call.method, url, json=call.body)
        return self._http.build_request(call.method, url, content=call.content, headers=FILE_HEADERS)

    def _max_retries(self, call: Call[Any]) -> int:
        return self.max_retries if call.retry else 0


class Client(_BaseClient[httpx.Client]):
    """For ordinary code. A context manager; may be shared between threads."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def complete(self, prompt: Prompt, *, model: str | None = None, **options: Unpack[GenerationOptions]) -> Completion:
        """Continues a prompt."""
        return self.answer(calls.complete(self._model(model), prompt, options))

    @contextmanager
    def stream_complete(
        self, prompt: Prompt, *, model: str | None = None, **options: Unpack[GenerationOptions]
    ) -> Iterator[Stream[Completion]]:
        """Continues a prompt, piece by piece. Leaving the context early cancels the request."""
        with self._stream(calls.stream_complete(self._model(model), prompt, options)) as stream:
            yield stream

    def chat(
        self, messages: Iterable[Message], *, model: str | None = None, **options: Unpack[GenerationOptions]
    ) -> ChatCompletion:
        """Answers the last message of a conversation."""
        return self.answer(calls.chat(self._model(model), messages, options))

    @contextmanager
    def stream_chat(
        self, messages: Iterable[Message], *, model: str | None = None, **options: Unpack[GenerationOptions]
    ) -> Iterator[Stream[ChatChunk]]:
        """Answers the last message, piece by piece. Leaving the context early cancels the request."""
        with self._stream(calls.stream_chat(self._model(model), messages, options)) as stream:
            yield stream

    def models(self) -> tuple[Model, ...]:
        """The models that the server serves."""
        return self.answer(calls.models())

    def model(self, name: str) -> Model:
        """One model; `NotFoundError` if it is not served."""
        return self.answer(calls.model(name))

    def tokenize(self, text: str, *, model: str | None = None, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text."""
        return self.answer(calls.tokenize(self._model(model), text, add_special_tokens=add_special_tokens))

    def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """Text of token ids."""
        return self.answer(calls.detokenize(self._model(model), tokens))

    def health(self) -> Health:
        """How the server says it is; `OverloadedError` if it says that it is not well."""
        return self.answer(calls.health())

    def is_ready(self) -> bool:
        """Whether the server is there and takes requests."""
        try:
            self.answer(calls.ready())
        except (APIConnectionError, OverloadedError):
            return False
        return True

    def answer(self, call: Call[ResultT]) -> ResultT:
        """The answer to any call."""
        response = self._exchange(call)
        try:
            with translated_transport_errors():
                response.read()
        finally:
            response.close()
        return calls.read_answer(call, response)

    @contextmanager
    def _stream(self, call: Call[ChunkT]) -> Iterator[Stream[ChunkT]]:
        response = self._exchange(call)
        try:
            yield Stream(response, call.parse)
        finally:
            response.close()

    def _exchange(self, call: Call[Any]) -> httpx.Response:
        """An answer below 400, not yet read; to be closed by the caller."""
        steps = exchange(self._request(call), max_retries=self._max_retries(call))
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as stop:
                response: httpx.Response = stop.value
                return response
            outcome = self._take(step)

    def _take(self, step: Step) -> Outcome:
        if isinstance(step, float):
            time.sleep(step)
            return None
        try:
            response = self._http.send(step, stream=True)
            if response.is_error:
                response.read()
        except httpx.TransportError as error:
            return error
        return response

    def _open(self, headers: dict[str, str], timeout: httpx.Timeout) -> httpx.Client:
        return httpx.Client(headers=headers, timeout=timeout, limits=LIMITS, follow_redirects=True)


class AsyncClient(_BaseClient[httpx.AsyncClient]):
    """For asyncio. An async context manager; cancelling a task cancels its request at the server."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def complete(
        self, prompt: Prompt, *, model: str | None = None, **options: Unpack[GenerationOptions]
    ) -> Completion:
        """Continues a prompt."""
        return await self.answer(calls.complete(self._model(model), prompt, options))

    @asynccontextmanager
    async def stream_complete(
        self, prompt: Prompt, *, model: str | None = None, **options: Unpack[GenerationOptions]
    ) -> AsyncIterator[AsyncStream[Completion]]:
        """Continues a prompt, piece by piece. Leaving the context early cancels the request."""
        async with self._stream(calls.stream_complete(self._model(model), prompt, options)) as stream:
            yield stream

    async def chat(
        self, messages: Iterable[Message], *, model: str | None = None, **options: Unpack[GenerationOptions]
    ) -> ChatCompletion:
        """Answers the last message of a conversation."""
        return await self.answer(calls.chat(self._model(model), messages, options))

    @asynccontextmanager
    async def stream_chat(
        self, messages: Iterable[Message], *, model: str | None = None, **options: Unpack[GenerationOptions]
    ) -> AsyncIterator[AsyncStream[ChatChunk]]:
        """Answers the last message, piece by piece. Leaving the context early cancels the request."""
        async with self._stream(calls.stream_chat(self._model(model), messages, options)) as stream:
            yield stream

    async def models(self) -> tuple[Model, ...]:
        """The models that the server serves."""
        return await self.answer(calls.models())

    async def model(self, name: str) -> Model:
        """One model; `NotFoundError` if it is not served."""
        return await self.answer(calls.model(name))

    async def tokenize(
        self, text: str, *, model: str | None = None, add_special_tokens: bool = True
    ) -> tuple[int, ...]:
        """Token ids of a text."""
        return await self.answer(calls.tokenize(self._model(model), text, add_special_tokens=add_special_tokens))

    async def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """Text of token ids."""
        return await self.answer(calls.detokenize(self._model(model), tokens))

    async def health(self) -> Health:
        """How the server says it is; `OverloadedError` if it says that it is not well."""
        return await self.answer(calls.health())

    async def is_ready(self) -> bool:
        """Whether the server is there and takes requests."""
        try:
            await self.answer(calls.ready())
        except (APIConnectionError, OverloadedError):
            return False
        return True

    async def answer(self, call: Call[ResultT]) -> ResultT:
        """The answer to any call."""
        response = await self._exchange(call)
        try:
            with translated_transport_errors():
                await response.aread()
        finally:
            await response.aclose()
        return calls.read_answer(call, response)

    @asynccontextmanager
    async def _stream(self, call: Call[ChunkT]) -> AsyncIterator[AsyncStream[ChunkT]]:
        response = await self._exchange(call)
        try:
            yield AsyncStream(response, call.parse)
        finally:
            await response.aclose()

    async def _exchange(self, call: Call[Any]) -> httpx.Response:
        """An answer below 400, not yet read; to be closed by the caller."""
        steps = exchange(self._request(call), max_retries=self._max_retries(call))
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as stop:
                response: httpx.Response = stop.value
                return response
            outcome = await self._take(step)

    async def _take(self, step: Step) -> Outcome:
        if isinstance(step, float):
            await asyncio.sleep(step)
            return None
        try:
            response = await self._http.send(step, stream=True)
            if response.is_error:
                await response.aread()
        except httpx.TransportError as error:
            return error
        return response

    def _open(self, headers: dict[str, str], timeout: httpx.Timeout) -> httpx.AsyncClient:
        return httpx.AsyncClient(headers=headers, timeout=timeout, limits=LIMITS, follow_redirects=True)
