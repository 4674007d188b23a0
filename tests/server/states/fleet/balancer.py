"""A plain balancer: whole connections, in turns, to servers whose `/ready` says 200; it repeats and mends nothing."""

import contextlib
import itertools
import socket
import threading
from collections.abc import Sequence
from typing import Self

import httpx

from tests.ports import free_port
from tests.waiting import PATIENCE_S, until

CHECK_S = 0.1


class Balancer:
    """See the module.

    Attributes:
        url: where it listens.
        ready: ports of the servers that get new connections.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = ports
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.ready: frozenset[int] = frozenset()
        self._turns = itertools.count()
        self._stopped = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)

    def __enter__(self) -> Self:
        for work in (self._check, self._accept):
            threading.Thread(target=work, daemon=True).start()
        until(lambda: self.ready == {*self._ports})
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _check(self) -> None:
        with httpx.Client(trust_env=False, timeout=10) as http:
            while not self._stopped.wait(CHECK_S):
                self.ready = frozenset(port for port in self._ports if _is_ready(http, port))

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        ready = sorted(self.ready)
        if not ready:
            client.close()
            return
        try:
            server = socket.create_connection(("127.0.0.1", ready[next(self._turns) % len(ready)]), PATIENCE_S)
        except OSError:
            client.close()
            return
        with client, server:
            back = threading.Thread(target=_pipe, args=(server, client), daemon=True)
            back.start()
            _pipe(client, server)
            back.join()


def _is_ready(http: httpx.Client, port: int) -> bool:
    try:
        return http.get(f"http://127.0.0.1:{port}/ready").status_code == 200
    except httpx.TransportError:
        return False


def _pipe(source: socket.socket, sink: socket.socket) -> None:
    """Bytes of one direction, and its end."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
