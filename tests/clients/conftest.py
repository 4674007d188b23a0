"""Fixtures of the client tests."""

from collections.abc import Callable

import pytest

from clients import exchange
from tests.clients.drivers import AsyncDriver, Driver, SyncDriver


@pytest.fixture(params=[SyncDriver, AsyncDriver], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Driver]:
    """Makes a client of either kind; its backoff takes no time."""
    monkeypatch.setattr(exchange, "INITIAL_DELAY_S", 0.0)
    made: Callable[..., Driver] = request.param
    return made
