"""Connections that are kept from holding anything for ever: uvicorn's protocol, with limits that it has not.

- The head of a request (request line and headers) must be complete within a time after the connection was made, or
  after its first byte on a connection that was used before, and may not be larger than a limit before that.
- What was sent must be read: a client that leaves it lying is cut off after a time. Until then the answer waits (see
  `HttpToolsProtocol.pause_writing`), so that no more of it than that piles up here.
- What cannot be read as HTTP is answered in the error envelope, and so is a connection for which no descriptor could be
  spared; that is logged, once a second.
- An offer to upgrade to another protocol (HTTP/2 in the clear, WebSocket) is ignored, as RFC 9110 allows: the request
  is read as if nobody had offered anything.

Bodies are limited by `server.http.middleware.BodyMiddleware`.
"""

import asyncio
import logging
from asyncio.events import TimerHandle
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.http.errors import HttpError, error_json

LINGER_S = 1.0
"""How long what still comes is thrown away after a refusal: closing at once would keep clients from reading it."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What one connection may take.

    Attributes:
        head_timeout_s: longest time for the head of a request to arrive.
        unread_timeout_s: longest time without what was sent being read.
        max_head_bytes: of a head that is not complete yet; one that comes in one piece may be larger.
        max_connections: open at once; 0: any number.
    """

    head_timeout_s: float
    unread_timeout_s: float
    max_head_bytes: int = 64 << 10
    max_connections: int = 0


def limited_protocol(limits: ConnectionLimits, on_cut: Callable[[str], None]) -> type[asyncio.Protocol]:
    """A protocol for `uvicorn.Config.http`.

    Args:
        limits: of each connection.
        on_cut: called with a word for why a connection was cut off: `slow_head`, `large_head`, `unreadable`,
            `unread`, `too_many`.
    """

    class Protocol(LimitedProtocol):
        _limits = limits

        def _cut(self, reason: str) -> None:
            on_cut(reason)

    return Protocol


class OfferIgnoringParser:
    """httptools' parser, which stops at an offer to upgrade; here another one reads on with the body of the request."""

    def __init__(self, protocol: "LimitedProtocol") -> None:
        self._protocol = protocol
        self._parser = self._new()

    def _new(self) -> Any:
        parser = httptools.HttpRequestParser(self._protocol)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        return parser

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    def feed_data(self, data: bytes) -> None:
        """Raises `httptools.HttpParserError`."""
        while True:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                data = data[offer.args[0] :]
            head = self._protocol.head_of_body()
            self._parser = self._new()
            self._protocol.is_repeating = True
            try:
                self._parser.feed_data(head)
            finally:
                self._protocol.is_repeating = False


class LimitedProtocol(HttpToolsProtocol):
    """One connection; made by `limited_protocol`.

    Attributes:
        is_repeating: the parser is told of a head again that was read already.
    """

    _limits: ClassVar[ConnectionLimits]
    _next_log_s: ClassVar[float] = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_repeating = False
        self.parser = OfferIgnoringParser(self)  # type: ignore[assignment]
        self._awaits_head = True  # no body is being read
        self._has_begun_head = False
        self._num_heads = 0
        self._num_head_bytes = 0
        self._is_refused = False
        self._head_timer: TimerHandle | None = None
        self._unread_timer: TimerHandle | None = None
        self._linger_timer: TimerHandle | None = None

    def _cut(self, reason: str) -> None:
        """Told why this connection ends."""
        raise NotImplementedError

    # What the transport calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if 0 < self._limits.max_connections < len(self.connections):
            self._refuse("too_many", 503, f"more than {self._limits.max_connections:,} connections are open")
            self._log_refusal()
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._unread_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        num_heads, awaited_head = self._num_heads, self._awaits_head
        super().data_received(data)
        if self._is_refused or not self._awaits_head:
            return
        if awaited_head and num_heads == self._num_heads:
            self._num_head_bytes += len(data)
        if self._num_head_bytes > self._limits.max_head_bytes:
            self._refuse("large_head", 431, f"more than {self._limits.max_head_bytes:,} bytes of headers")
        elif self._head_timer is None and (self._has_begun_head or not self._is_answering):
            self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    # What the parser calls.

    def on_message_begin(self) -> None:
        if not self.is_repeating:
            super().on_message_begin()
            self._has_begun_head = True

    def on_url(self, url: bytes) -> None:
        if not self.is_repeating:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.is_repeating:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.is_repeating:
            return
        self._awaits_head = self._has_begun_head = False
        self._num_heads += 1
        self._num_head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            assert self.cycle is not None
            self.cycle.send = _until_close(self.cycle)  # type: ignore[method-assign,assignment]

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # the parser takes an offer for the end of the request; what follows it is read as its body
        self._awaits_head = True
        super().on_message_complete()

    def head_of_body(self) -> bytes:
        """A head that says of the request's body what its own head says, and offers nothing."""
        framing = (b"content-length", b"transfer-encoding", b"connection")
        lines = [b"POST / HTTP/1.1"]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in tokens if token.lower() in (b"close", b"keep-alive"))
            if name in framing and value:
                lines.append(name + b": " + value)
        return b"\r\n".join((*lines, b"", b""))

    # What uvicorn calls.

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_reader_of_the_rest()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._expect_reader_of_the_rest()

    def send_400_response(self, msg: str) -> None:
        self._refuse("unreadable", 400, "the request cannot be read as HTTP")

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.head_timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._is_answering:
            self._expect_head()  # of a request that was sent behind another one, whose answer goes on
        elif self._has_begun_head:
            self._refuse("slow_head", 408, f"the headers did not arrive within {self._limits.head_timeout_s:g} s")
        elif not self.transport.is_closing():
            self._cut("slow_head")
            self.transport.close()

    def _expect_reader(self) -> None:
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(self._limits.unread_timeout_s, self._is_unread)

    def _expect_reader_of_the_rest(self) -> None:
        """A closed connection lives on until the rest of what was sent is read."""
        if self.transport.get_write_buffer_size() > 0:
            self._expect_reader()

    def _log_refusal(self) -> None:
        now = self.loop.time()
        if now >= LimitedProtocol._next_log_s:
            LimitedProtocol._next_log_s = now + 1.0
            _log.warning("connections are refused: %s are open, as many as may be", f"{len(self.connections) - 1:,}")

    def _is_unread(self) -> None:
        _log.info("a connection was cut off: its client did not read for %g s", self._limits.unread_timeout_s)
        self._cut("unread")
        self.transport.abort()

    def _refuse(self, reason: str, status: int, message: str) -> None:
        """Answers what is no whole request; the connection ends."""
        self._is_refused = True
        self._cut(reason)
        if self._is_answering:
            assert self.cycle is not None
            is_in_body = not (self._awaits_head or self.pipeline or self.cycle.response_started)
            if not is_in_body:
                self.cycle.keep_alive = False  # answers are on their way: nothing comes between, nor after
                return
            self.cycle.disconnected = True  # this answer is the only one to what has begun
        body = error_json(HttpError(message, code=_CODES[status], status=status))
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        if status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)
        else:
            self.transport.close()


def _until_close(cycle: RequestResponseCycle) -> Callable[[Any], Coroutine[Any, Any, None]]:
    """Sends an answer without chunks, which HTTP/1.0 does not know: one of no told length ends with the connection."""
    send = cycle.send

    async def send_plain(message: Any) -> None:
        if message["type"] == "http.response.start":
            if all(name.lower() != b"content-length" for name, _ in message.get("headers", ())):
                cycle.chunked_encoding = False
        elif cycle.chunked_encoding is False and cycle.expected_content_length == 0:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return send_plain


_CODES = {400: "invalid_http", 408: "headers_timeout", 431: "headers_too_large", 503: "too_many_connections"}
