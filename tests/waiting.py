"""Waits for events: a test goes on as soon as one has happened, and gives up only where it never will.

The limit is far above what a loaded machine needs: it tells a hang from a slow machine, and measures nothing.
"""

import asyncio
import time
from collections.abc import Callable

PATIENCE_S = 180.0
POLL_S = 0.02


def until(condition: Callable[[], object], *, or_fail: Callable[[], str] = lambda: "it did not happen") -> None:
    """Returns when the condition holds.

    Args:
        condition: asked again and again; may raise, which ends the test.
        or_fail: the message of the failure, asked for when patience has ended.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, or_fail()
        time.sleep(POLL_S)


async def until_async(condition: Callable[[], object]) -> None:
    """The same without blocking the event loop."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(POLL_S)
