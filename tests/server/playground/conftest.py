"""The fixtures of the HTTP tests, a service with a scripted engine on loopback; and a Chromium."""

from collections.abc import Iterator

import pytest

from tests.server.conftest import (  # noqa: F401 (fixtures, by their names)
    _quiet_logs,
    byte_tokenizer,
    options,
    server,
    shared_loopback,
    tokenizer_folder,
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[None]:
    from tests.server.playground.browser import started  # which needs playwright

    with started():
        yield
