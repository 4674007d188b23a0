"""From settings to a running service: the engine's process is started before anything that it need not wait for."""

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Any

from server.startup.errors import StartError
from server.startup.logs import configure_logging
from server.startup.notices import Notices
from server.startup.prepare import Prepared, prepare
from server.startup.settings import Settings, misplaced_key
from server.startup.started import started


def run(settings: Settings, notices: Notices) -> None:
    """Serves until a signal ends it.

    Raises:
        StartError: the model, the device, the address or the engine cannot be used.
    """
    configure_logging(level=settings.log_level, log_format=settings.log_format)
    if misplaced_key(settings):
        notices.warn(
            "DIJIANG_API_KEY is for clients; the server's keys are DIJIANG_API_KEYS, "
            "and without them everybody has access"
        )
    prepared = prepare(settings, notices)
    _event_loop_runner()(_serve(prepared, _bind(settings), notices))


async def _serve(prepared: Prepared, listener: socket.socket, notices: Notices) -> None:
    """Starts the engine, then all else; the port is served while the engine loads."""
    async with started(prepared) as (service, tokenizer):
        from server.startup.front import serve_http  # by now it was imported

        await serve_http(prepared, service, tokenizer, listener, notices)
        if prepared.engine.failure is not None:
            raise StartError(f"the engine cannot run: {prepared.engine.failure}")


def _bind(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        hint = "; --port names another one, and --port 0 takes a free one" if error.errno == errno.EADDRINUSE else ""
        raise StartError(f"{settings.host} port {settings.port} cannot be used: {error.strerror}{hint}") from error
    listener.set_inheritable(False)
    return listener


def _event_loop_runner() -> Callable[..., Any]:
    try:
        import uvloop
    except ImportError:  # not made for Windows
        return asyncio.run
    return uvloop.run
