"""A store of each kind."""

from collections.abc import AsyncIterator

import pytest

from server.states.store import StateStore
from tests.server.states.stores import Kind


@pytest.fixture
async def store(kind: Kind) -> AsyncIterator[StateStore]:
    store = kind.open()
    yield store
    await store.close()
