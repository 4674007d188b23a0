"""A real server on loopback, in a thread of its own, with a fake engine behind it."""

import asyncio
import logging
import signal
import socket
import threading
from asyncio.trsock import TransportSocket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn

from server.app import create_app
from server.http.connections import ConnectionLimits, limited_protocol
from server.http.draining import DrainingServer
from server.options import ServiceOptions
from server.service import Service
from server.startup.logs import configure_logging
from server.text.tokenizer import Tokenizer, load_tokenizer
from server.tracing import NO_TRACER, Tracer
from tests.byte_tokenizer import write_byte_tokenizer
from tests.server.fake_engine import FakeEngine
from tests.waiting import PATIENCE_S, until

OPTIONS = ServiceOptions(
    model_name="org/tiny", version="1.2.3", max_n=8, max_prompts=8, max_choices=16, keepalive_s=5.0
)
LIMITS = ConnectionLimits(head_timeout_s=10.0, unread_timeout_s=60.0)


class Loopback:
    """A running service and ways to talk to it."""

    def __init__(self, service: Service, engine: FakeEngine, port: int, thread: threading.Thread) -> None:
        self.signal: Callable[[], None] = lambda: None
        self.listener: TransportSocket | None = None
        self.thread = thread
        self.service = service
        self.engine = engine
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S, trust_env=False)
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key="any",
            max_retries=0,
            timeout=PATIENCE_S,
        )

    def close(self) -> None:
        self.http.close()
        self.openai.close()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that another thread brings about."""
        until(condition)


@contextmanager
def serve(
    engine: FakeEngine,
    options: ServiceOptions,
    tokenizer: Tokenizer | None,
    *,
    drain_timeout_s: float | None = None,
    drain_delay_s: float = 0.0,
    limits: ConnectionLimits = LIMITS,
    tracer: Tracer = NO_TRACER,
) -> Iterator[Loopback]:
    """Runs the application on an ephemeral port until the context is left; with a timeout: as `dijiang serve` does."""
    service = Service(engine, options, tokenizer, tracer=tracer)
    config = uvicorn.Config(
        create_app(service),
        port=0,
        log_config=None,
        ws="none",
        lifespan="off",
        http=limited_protocol(limits, on_cut=lambda reason: service.metrics.connections_cut.labels(reason).inc()),
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    if drain_timeout_s is not None:
        server = DrainingServer(config, service, engine, drain_timeout_s=drain_timeout_s, drain_delay_s=drain_delay_s)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    loopback = Loopback(service, engine, port, thread)
    loopback.listener = server.servers[0].sockets[0]
    loopback.signal = lambda: server.handle_exit(signal.SIGTERM, None)
    try:
        yield loopback
    finally:
        loopback.close()
        server.should_exit = True
        thread.join(PATIENCE_S)


def raw_exchange(server: Loopback, *chunks: bytes) -> bytes:
    """Sends bytes as they are and reads until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        for chunk in chunks:
            connection.sendall(chunk)
        answer = b""
        while received := connection.recv(65536):
            answer += received
        return answer


@pytest.fixture(scope="session", autouse=True)
def _quiet_logs() -> Iterator[None]:
    """Log lines through the standard library, where pytest keeps them for failing tests."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    configure_logging(level="info", log_format="console")
    root.handlers = handlers
    yield
    root.level = level


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer(tokenizer_folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="session")
def shared_loopback(byte_tokenizer: Tokenizer) -> Iterator[Loopback]:
    with serve(FakeEngine(), OPTIONS, byte_tokenizer) as running:
        yield running


@pytest.fixture
def server(shared_loopback: Loopback) -> Iterator[Loopback]:
    """The shared server with a fresh engine script; nothing may be left running by the test before."""
    fresh = FakeEngine()
    shared_loopback.engine.__dict__.update(fresh.__dict__)
    yield shared_loopback
    shared_loopback.wait_until(lambda: not shared_loopback.engine.running)
    shared_loopback.service.draining = False


@pytest.fixture
def options() -> ServiceOptions:
    return replace(OPTIONS)
