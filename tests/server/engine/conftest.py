"""Asynchronous tests run on asyncio, as the service does."""

import pytest


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"
