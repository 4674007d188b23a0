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
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import uvicorn
from rich.console import Console

from dijiang_model.errors import ConfigError
from dijiang_model.text.folder import UnsupportedTokenizerError
from dijiang_model.text.template import TemplateSyntaxFailure
from server.engine.types.requests import EngineConfig
from server.engine_client.client import EngineClient
from server.errors import EngineUnavailableError
from server.grammar_check.checker import GrammarChecker
from server.hardware import HardwareError, find_device, max_connections, raised_descriptor_limit
from server.http.draining import DrainingServer
from server.service import Service, ServiceOptions
from server.startup.assemble import (
    engine_config,
    find_model,
    grammar_limits,
    make_tracer,
    open_store,
    recipe_of,
    service_options,
)
from server.startup.errors import StartError
from server.startup.keys import Files, key_options
from server.startup.logs import configure_logging
from server.startup.settings import Settings, misplaced_key
from server.startup.summary import Summary
from server.states.errors import StoreError
from server.states.store import StateStore
from server.text.tokenizer import Tokenizer, load_tokenizer

LAST_ANSWERS_S = 5
LOOK_EVERY_S = 5.0
EXIT_OVERDUE = 1


def run(settings: Settings, console: Console) -> None:
    """Serves until a signal ends it.

    Raises:
        StartError: the model, the device, the address or the engine cannot be used.
    """
    configure_logging(level=settings.log_level, log_format=settings.log_format)
    if misplaced_key(settings):
        console.print(
            "[yellow]warning:[/yellow] DIJIANG_API_KEY is for clients; the server's keys are DIJIANG_API_KEYS, "
            "and without them everybody has access",
            highlight=False,
        )
    model, default_name = find_model(settings, console)
    try:
        device = find_device(settings.device, num_ranks=settings.tensor_parallel)
        store = open_store(settings, default_name, console)
        config = engine_config(settings, model, device, store)
    except (HardwareError, StoreError) as error:
        raise StartError(str(error)) from error
    start = _Start(settings, model, default_name, config, EngineClient(config), store, _bind(settings))
    _event_loop_runner()(_serve(start, console))


@dataclass(frozen=True, slots=True)
class _Start:
    """What is settled before the engine starts."""

    settings: Settings
    model: Path
    default_name: str
    config: EngineConfig
    engine: EngineClient
    store: StateStore | None
    listener: socket.socket

    def make_service(self) -> tuple[Service, Tokenizer | None]:
        """Imports the application and reads the tokenizer: a second's work that the engine need not wait for.

        Raises:
            StartError: the tokenizer, the chat template, the keys or the tracer cannot be used.
        """
        import_module("server.app")
        import_module("server.http.connections")
        try:
            tokenizer = load_tokenizer(self.model)
            grammars = None if tokenizer is None else GrammarChecker(self.model, grammar_limits(self.settings))
            service = Service(
                self.engine,
                self._options(),
                tokenizer,
                states=self.store,
                grammars=grammars,
                read_again=self._read,
                tracer=make_tracer(self.settings),
            )
        except (ConfigError, UnsupportedTokenizerError, TemplateSyntaxFailure) as error:
            raise StartError(str(error)) from error
        if tokenizer is None and self.settings.reasoning_parser == "think":
            raise StartError("reasoning_parser think has no effect: the model has no tokenizer")
        return service, tokenizer

    def make_server(self, service: Service) -> DrainingServer:
        return DrainingServer(
            _http_config(self.settings, service),
            service,
            self.engine,
            drain_timeout_s=self.settings.drain_timeout_s,
            drain_delay_s=self.settings.drain_delay_s,
            give_up=_end_at_once,
        )

    def _options(self) -> ServiceOptions:
        return service_options(self.settings, self.model, self.default_name)

    def _read(self) -> tuple[ServiceOptions, Tokenizer | None]:
        return self._options(), load_tokenizer(self.model)


async def _serve(start: _Start, console: Console) -> None:
    """Starts the engine, then all else; the port is served while the engine loads."""
    engine = start.engine
    await engine.start()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(engine.close)
        service, tokenizer = await asyncio.to_thread(start.make_service)
        stack.push_async_callback(service.close)
        server = start.make_server(service)
        claiming = asyncio.create_task(_claim(service))
        rereading = asyncio.create_task(_reread(start.settings, service, server.config))
        if service.states is not None:
            await service.states.start(service.end_background)
        recipe = recipe_of(start.model)
        summary = Summary(start.settings, start.config, service.options, recipe, tokenizer, start.listener)
        console.print(f"Loading {summary.model}; the port of {summary.base_url} is open already", highlight=False)
        waiting = asyncio.create_task(_announce(engine, summary, console))
        try:
            await server.serve(sockets=[start.listener])
        finally:
            waiting.cancel()
            claiming.cancel()
            rereading.cancel()
            await asyncio.gather(waiting, claiming, rereading, return_exceptions=True)
            failure = engine.failure
            await engine.close()  # before the service, which keeps what the engine still writes
    if failure is not None:
        raise StartError(f"the engine cannot run: {failure}")


async def _claim(service: Service) -> None:
    from server.responses.background import claim_forever  # by now the application was imported

    await claim_forever(service)


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


async def _announce(engine: EngineClient, summary: Summary, console: Console) -> None:
    with contextlib.suppress(EngineUnavailableError):
        console.print(summary.table(await engine.wait_ready()))


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


def _http_config(settings: Settings, service: Service) -> uvicorn.Config:
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
