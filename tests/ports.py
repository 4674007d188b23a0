"""Free ports of this machine for servers that are started as processes of their own."""

import socket

_HELD: list[socket.socket] = []
"""Bound until this process ends, so that no other worker of the tests is given the same port meanwhile."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody else is given: a server may listen there, since both allow reuse."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    _HELD.append(held)
    port: int = held.getsockname()[1]
    return port
