"""Asynchronous tests run on asyncio, as the service does; one real server for the tests that do not kill it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.states.running import Running, running
from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tiny, tmp_path_factory.mktemp("states") / "one") as server:
        yield server
