"""A scripted HTTP server on loopback: each test says, byte by byte, what it answers.

It runs in a thread, speaks HTTP/1.1 over real sockets, and records the requests it got and whether the
client was still there at the end of an answer.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.waiting import PATIENCE_S

Handler = Callable[["Exchange"], None]
EVENT_STREAM = "text/event-stream; charset=utf-8"


@dataclass(slots=True)
class Exchange:
    """One request, and the means to answer it."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any
    handler: BaseHTTPRequestHandler

    def answer(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        """A whole answer: JSON, or text as it is."""
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.handler.send_response(status)
        self.handler.send_header("content-length", str(len(data)))
        for name, value in (headers if headers is not None else {}).items():
            self.handler.send_header(name, value)
        self.handler.end_headers()
        self.handler.wfile.write(data)

    def start_stream(self, content_type: str = EVENT_STREAM) -> None:
        self.handler.send_response(200)
        self.handler.send_header("content-type", content_type)
        self.handler.send_header("transfer-encoding", "chunked")
        self.handler.end_headers()

    def send(self, data: bytes) -> None:
        """One transfer chunk, hence (on loopback) one read of the client."""
        self.handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.handler.wfile.flush()

    def end_stream(self) -> None:
        self.handler.wfile.write(b"0\r\n\r\n")

    def stream(self, *events: object) -> None:
        """A whole stream of JSON events, ended as OpenAI ends it."""
        self.start_stream()
        for event in events:
            self.send(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.send(b"data: [DONE]\n\n")
        self.end_stream()

    def wait_for_disconnect(self) -> None:
        """Returns when the client has closed the connection."""
        self.handler.connection.settimeout(PATIENCE_S)
        try:
            while self.handler.connection.recv(1024):
                pass
        except ConnectionError:
            pass


@dataclass(slots=True)
class LoopbackServer:
    """A running server.

    Attributes:
        url: its root, without `/v1`.
        requests: everything that came, in order.
        disconnected: set by a test's handler when the client has gone away.
    """

    url: str
    requests: list[Exchange] = field(default_factory=list)
    disconnected: threading.Event = field(default_factory=threading.Event)


@contextmanager
def loopback_server(handle: Handler) -> Iterator[LoopbackServer]:
    """Serves `handle` until the context ends."""

    class _Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve(None)

        def do_POST(self) -> None:
            self._serve(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def _serve(self, body: Any) -> None:
            exchange = Exchange(self.command, self.path, dict(self.headers), body, self)
            server.requests.append(exchange)
            handle(exchange)

        def log_message(self, format: str, *args: Any) -> None:
            """Tests need no access log."""

    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as http:
        server = LoopbackServer(f"http://127.0.0.1:{http.server_address[1]}")
        http.daemon_threads = False  # the end of the context waits for every answer
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
