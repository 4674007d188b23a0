"""Server-sent events, and the streams of chunks made of them.

`EventDecoder` and `ChunkParser` do no input or output: bytes are pushed in, events and chunks come out.
`Stream` and `AsyncStream` only fetch the bytes.
"""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import httpx

from clients.calls import parse_value
from clients.errors import APIConnectionError, APIResponseError, StreamError
from clients.exchange import translated_transport_errors
from clients.types import Usage

END_OF_STREAM = "[DONE]"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Chunk(Protocol):
    """What the streams need to know of a chunk."""

    @property
    def text(self) -> str:
        """New text of choice 0."""

    @property
    def finish_reason(self) -> str | None:
        """Why choice 0 ended."""

    @property
    def usage(self) -> Usage | None:
        """Tokens so far."""


ChunkT = TypeVar("ChunkT", bound=Chunk)


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event: its name (`message` unless named) and its data lines joined by new lines."""

    event: str
    data: str


class EventDecoder:
    """Incremental parser of an event stream (WHATWG HTML, section 9.2.6); bytes may be split anywhere."""

    def __init__(self) -> None:
        self._buffer = b""
        self._at_start = True
        self._after_return = False
        self._event = ""
        self._data: list[str] = []

    def push(self, data: bytes) -> list[ServerSentEvent]:
        """Takes the next bytes and returns the events that they complete."""
        self._buffer += data
        if self._at_start and not self._skip_byte_order_mark():
            return []
        return [event for line in self._take_lines() if (event := self._line(line)) is not None]

    def _skip_byte_order_mark(self) -> bool:
        """False while the bytes so far may be the beginning of a mark."""
        if len(self._buffer) < len(_BYTE_ORDER_MARK) and _BYTE_ORDER_MARK.startswith(self._buffer):
            return False
        self._buffer = self._buffer.removeprefix(_BYTE_ORDER_MARK)
        self._at_start = False
        return True

    def _take_lines(self) -> list[bytes]:
        """Removes the complete lines from the buffer. Lines end in LF, CR or CR LF."""
        if self._after_return and self._buffer:
            # The carriage return that ended the last push was half of a CR LF.
            self._buffer = self._buffer.removeprefix(b"\n")
            self._after_return = False
        if self._buffer.endswith(b"\r"):
            self._after_return = True
        lines = self._buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._buffer = lines.pop()
        return lines

    def _line(self, line: bytes) -> ServerSentEvent | None:
        if not line:
            return self._dispatch()
        # A comment, `: keep-alive`, has the empty field name and falls through.
        name, _, value = line.decode("utf-8", errors="replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        return None

    def _dispatch(self) -> ServerSentEvent | None:
        event, data = self._event, self._data
        self._event, self._data = "", []
        if not data:
            return None
        return ServerSentEvent(event if event != "" else "message", "\n".join(data))


class ChunkParser(Generic[ChunkT]):
    """Turns the bytes of one answer into chunks, and keeps what they tell about the whole.

    Attributes:
        usage: from the last chunk that had one.
        finish_reason: of choice 0, once it ended.
        done: the server's end mark was seen.
    """

    def __init__(self, parse: Callable[[object], ChunkT]) -> None:
        self._parse = parse
        self._decoder = EventDecoder()
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.done = False

    def push(self, data: bytes) -> Iterator[ChunkT]:
        """Takes the next bytes; yields the chunks that they complete.

        Raises:
            StreamError: the server reported an error; chunks before it were yielded.
            APIResponseError: an event that is no chunk.
        """
        for event in self._decoder.push(data):
            if event.data == END_OF_STREAM:
                self.done = True
                return
            yield self._chunk(event.data)

    def finish(self) -> None:
        """To be called when the bytes end.

        Raises:
            APIConnectionError: they ended in the middle of the answer.
        """
        if not self.done and self.finish_reason is None:
            raise APIConnectionError("the stream ended in the middle of the answer")

    def _chunk(self, data: str) -> ChunkT:
        try:
            body = json.loads(data)
        except json.JSONDecodeError as error:
            raise APIResponseError(f"the stream holds an event that is not JSON: {data[:80]!r}") from error
        if isinstance(body, dict) and body.get("error") is not None:
            raise StreamError.from_body(body["error"])
        chunk = parse_value(self._parse, body)
        if chunk.usage is not None:
            self.usage = chunk.usage
        if chunk.finish_reason is not None:
            self.finish_reason = chunk.finish_reason
        return chunk


class _StreamState(Generic[ChunkT]):
    """What both kinds of stream offer besides iteration."""

    def __init__(self, response: httpx.Response, parse: Callable[[object], ChunkT]) -> None:
        content_type = response.headers.get("content-type", "")
        if not content_type.startswith("text/event-stream"):
            raise APIResponseError(f"the server answered with {content_type or 'no content type'}, not with a stream")
        self.response = response
        self._parser = ChunkParser(parse)

    @property
    def usage(self) -> Usage | None:
        """Tokens of the whole request; None until the server tells them, at the end."""
        return self._parser.usage

    @property
    def finish_reason(self) -> str | None:
        """Why choice 0 ended; None while it goes on."""
        return self._parser.finish_reason


class Stream(_StreamState[ChunkT]):
    """An answer as it comes: iterate chunks, or `text_stream`. Iterable once; leaving its `with` cancels."""

    def __iter__(self) -> Iterator[ChunkT]:
        with translated_transport_errors():
            for data in self.response.iter_bytes():
                yield from self._parser.push(data)
                if self._parser.done:
                    break
        self._parser.finish()

    @property
    def text_stream(self) -> Iterator[str]:
        """The text of choice 0, piece by piece; no empty pieces."""
        return (chunk.text for chunk in self if chunk.text)


class AsyncStream(_StreamState[ChunkT]):
    """An answer as it comes: iterate chunks, or `text_stream`. Iterable once; leaving its `async with` cancels."""

    async def __aiter__(self) -> AsyncIterator[ChunkT]:
        with translated_transport_errors():
            async for data in self.response.aiter_bytes():
                for chunk in self._parser.push(data):
                    yield chunk
                if self._parser.done:
                    break
        self._parser.finish()

    @property
    def text_stream(self) -> AsyncIterator[str]:
        """The text of choice 0, piece by piece; no empty pieces."""
        return (chunk.text async for chunk in self if chunk.text)
