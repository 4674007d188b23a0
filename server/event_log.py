"""The events of an answer that is made while nobody waits, for any number of readers who come and go."""

import asyncio
from collections.abc import AsyncGenerator


class EventLog:
    """Grows until it has ended; events are numbered from 0."""

    def __init__(self) -> None:
        self._events: list[bytes] = []
        self._has_ended = False
        self._changed = asyncio.Event()

    @property
    def num_events(self) -> int:
        return len(self._events)

    def append(self, event: bytes) -> None:
        """Adds an event."""
        self._events.append(event)
        self._notify()

    def end(self) -> None:
        """Nothing comes any more."""
        self._has_ended = True
        self._notify()

    async def follow(self, begin: int, *, keepalive_s: float, keepalive: bytes) -> AsyncGenerator[bytes, None]:
        """Events from number `begin` on, as they come; `keepalive` after that much silence."""
        while True:
            while begin < len(self._events):
                yield self._events[begin]
                begin += 1
            if self._has_ended:
                return
            changed = self._changed
            try:
                async with asyncio.timeout(keepalive_s):
                    await changed.wait()
            except TimeoutError:
                yield keepalive

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
