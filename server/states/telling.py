"""What the index is told when a request is over, and would hear at the next heartbeat anyway."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from server.states.errors import StorageFullError, StoreUnavailableError

MOMENT_S = 1.0
"""How long a request waits until it is told: a store that hangs does not hold up what is over."""
_NOT_NOW = (StoreUnavailableError, StorageFullError)


class Telling:
    """Runs work on the index that goes on though the request that asks for it is cancelled, or waits no longer."""

    def __init__(self, run: Callable[[Callable[[], object]], Awaitable[object]]) -> None:
        """
        Args:
            run: work on a thread of the database's.
        """
        self._run = run
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, work: Callable[[], object]) -> None:
        """Begins, and waits a moment for the end; a store that is away, or full, is no error."""
        task = asyncio.create_task(self._told(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        done, _ = await asyncio.wait([task], timeout=MOMENT_S)
        for ended in done:
            ended.result()

    async def ended(self) -> None:
        """Returns when all that was begun has ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _told(self, work: Callable[[], object]) -> None:
        with suppress(*_NOT_NOW):
            await self._run(work)
