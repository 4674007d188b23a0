"""The way from settings to a running service: the engine's process first, then everything that it need not wait for."""

import asyncio
import contextlib
import errno
import logging
import math
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from server.engine_client.client import EngineClient
from server.errors import EngineUnavailableError
from server.hardware import max_connections, raised_descriptor_limit
from server.http.draining import DrainingServer
from server.service import Service
from server.startup.assemble import (
    recipe_of,
)
from server.startup.errors import StartError
from server.startup.keys import Files, key_options
from server.startup.logs import configure_logging
from server.startup.notices import Notices
from server.startup.prepare import Prepared, prepare, started
from server.startup.settings import Settings, misplaced_key
from server.startup.summary import Summary

LAST_ANSWERS_S = 5
LOOK_EVERY_S = 5.0
EXIT_OVERDUE = 1


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
    settings, engine = prepared.settings, prepared.engine
    async with started(prepared) as (service, tokenizer):
        server = DrainingServer(
            http_config(settings, service),
            service,
            engine,
            drain_timeout_s=settings.drain_timeout_s,
            drain_delay_s=settings.drain_delay_s,
            give_up=_end_at_once,
        )
        rereading = asyncio.create_task(_reread(settings, service, server.config))
        recipe = recipe_of(prepared.model)
        summary = Summary(settings, prepared.config, service.options, recipe, tokenizer, listener)
        notices.say(f"Loading {summary.model}; the port of {summary.base_url} is open already")
        waiting = asyncio.create_task(_announce(engine, summary, notices))
        try:
            await server.serve(sockets=[listener])
        finally:
            waiting.cancel()
            rereading.cancel()
            await asyncio.gather(waiting, rereading, return_exceptions=True)
            failure = engine.failure
    if failure is not None:
        raise StartError(f"the engine cannot run: {failure}")


async def _reread(settings: Settings, service: Service, config: uvicorn.Config) -> None:
    """Reads keys and certificates again when their files change, and on SIGHUP; what cannot be read changes nothing."""
    log, told = logging.getLogger(__name__), asyncio.Event()
    with contextlib.suppress(NotImplementedError, AttributeError):  # not made for Windows
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, told.set)
    files = Files(
        (settings.api_keys_file, settings.admin_keys_file, settings.keys_file, settings.tls_cert, settings.tls_key)
    )
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(told.wait(), LOOK_EVERY_S)
        if not files.have_changed() and not told.is_set():
            continue
        told.clear()
        try:
            service.change_keys(**await asyncio.to_thread(key_options, settings))
            if config.ssl is not None and settings.tls_cert is not None:
                config.ssl.load_cert_chain(settings.tls_cert, settings.tls_key)
        except (StartError, OSError) as error:  # of which every SSL error is one
            log.error("keys and certificates stay as they are: %s", error)
        else:
            log.info("keys and certificates were read again: %d keys", len(service.options.key_hashes))


async def _announce(engine: EngineClient, summary: Summary, notices: Notices) -> None:
    with contextlib.suppress(EngineUnavailableError):
        notices.show("DiJiang is ready", summary.rows(await engine.wait_ready()))


def _end_at_once() -> None:
    """Nothing is lost by it that a `kill -9` would not lose: files and rows are whole or not there."""
    logging.getLogger(__name__).error("something does not let the server end in time; ending it")
    os._exit(EXIT_OVERDUE)


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


def http_config(settings: Settings, service: Service) -> uvicorn.Config:
    """How connections are served. Raises `StartError`."""
    # By now these were imported beside the engine's start.
    from server.app import create_app
    from server.http.connections import ConnectionLimits, limited_protocol

    limits = ConnectionLimits(
        settings.header_timeout_s, settings.unread_timeout_s, max_connections=max_connections(raised_descriptor_limit())
    )
    config = uvicorn.Config(
        create_app(service),
        http=limited_protocol(limits, on_cut=lambda reason: service.metrics.connections_cut.labels(reason).inc()),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_ANSWERS_S,
        timeout_keep_alive=math.ceil(settings.idle_connection_s),
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    try:
        config.load()
    except OSError as error:  # of which every SSL error is one
        raise StartError(f"tls_cert and tls_key cannot be used: {error}") from error
    return config


def _event_loop_runner() -> Callable[..., Any]:
    try:
        import uvloop
    except ImportError:  # not made for Windows
        return asyncio.run
    return uvloop.run
