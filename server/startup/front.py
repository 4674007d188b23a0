"""The service on a port: the HTTP server, what is read again while it runs, what an operator is told."""

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket

import uvicorn

from server.app import create_app
from server.engine_client.client import EngineClient
from server.errors import EngineUnavailableError
from server.hardware import max_connections, raised_descriptor_limit
from server.http.connections import ConnectionLimits, limited_protocol
from server.http.draining import DrainingServer
from server.service import Service
from server.startup.assemble import recipe_of
from server.startup.errors import StartError
from server.startup.keys import Files, key_options
from server.startup.notices import Notices
from server.startup.prepare import Prepared
from server.startup.settings import Settings
from server.startup.summary import Summary
from server.text.tokenizer import Tokenizer

LAST_ANSWERS_S = 5
LOOK_EVERY_S = 5.0
EXIT_OVERDUE = 1


async def serve_http(
    prepared: Prepared, service: Service, tokenizer: Tokenizer | None, listener: socket.socket, notices: Notices
) -> None:
    """Answers on a port until a signal ends it, also while the engine loads; says when that is done.

    Raises:
        StartError: the files for TLS cannot be used.
    """
    settings, engine = prepared.settings, prepared.engine
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


def http_config(settings: Settings, service: Service) -> uvicorn.Config:
    """How connections are served. Raises `StartError`."""
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
