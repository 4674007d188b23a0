"""A reverse proxy that puts a server below a path, as operators do."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from tests.waiting import PATIENCE_S

DROPPED = frozenset(("connection", "transfer-encoding", "content-length", "keep-alive"))


@contextmanager
def below(path: str, upstream: str) -> Iterator[str]:
    """The address under which everything of `upstream` is to be had, until the context ends."""

    class _Handler(BaseHTTPRequestHandler):
        def _forward(self) -> None:
            if not self.path.startswith(f"{path}/"):
                self.send_error(404)
                return
            length = int(self.headers.get("content-length", 0))
            headers = {name: value for name, value in self.headers.items() if name.lower() not in {*DROPPED, "host"}}
            with client.stream(
                self.command, self.path.removeprefix(path), content=self.rfile.read(length), headers=headers
            ) as answer:
                self.send_response(answer.status_code)
                for name, value in answer.headers.items():
                    if name not in DROPPED:
                        self.send_header(name, value)
                self.end_headers()
                try:
                    for piece in answer.iter_raw():
                        self.wfile.write(piece)
                        self.wfile.flush()
                except ConnectionError:
                    pass  # the reader left, and so does the proxy

        do_GET = do_HEAD = do_POST = do_DELETE = _forward

        def log_message(self, format: str, *args: object) -> None:
            """Tests need no access log."""

    with (
        httpx.Client(base_url=upstream, timeout=PATIENCE_S, trust_env=False) as client,
        ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as http,
    ):
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}{path}"
        finally:
            http.shutdown()
            thread.join()
