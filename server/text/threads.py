"""Threads for work on long texts, mostly tokenizing, which lets go of the interpreter lock.

A key has few places in them for texts of about one length, so that many long ones keep neither other keys nor its own
shorter ones waiting. Who leaves gives up a place in the queue; what has begun cannot be stopped and holds its place to
its end, so that sending and leaving again and again takes no more threads than staying does.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

MAX_INLINE_CHARACTERS = 4096
PLACES = 2
"""Of each key for texts of each length."""
MAX_THREADS = 64
T = TypeVar("T")
_Lane = tuple[str, int]


class TextThreads:
    """See the module. Used on one event loop."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="texts")
        self._places: dict[_Lane, asyncio.Semaphore] = {}
        self._users: Counter[_Lane] = Counter()

    async def run(self, owner: str, num_characters: int, work: Callable[[], T]) -> T:
        """Runs `work` here if it is short, else in a thread, so that the event loop goes on.

        Args:
            owner: whose text it is.
            num_characters: about how long it is.
        """
        if num_characters <= MAX_INLINE_CHARACTERS:
            return work()
        lane = (owner, num_characters.bit_length() // 4)  # up to 16 times as long
        has_begun = asyncio.Event()
        task = asyncio.create_task(self._in_turn(lane, work, has_begun))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not has_begun.is_set():
                task.cancel()
            raise

    async def _in_turn(self, lane: _Lane, work: Callable[[], T], has_begun: asyncio.Event) -> T:
        self._users[lane] += 1
        try:
            async with self._places.setdefault(lane, asyncio.Semaphore(PLACES)):
                has_begun.set()
                return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._users[lane] -= 1
            if self._users[lane] == 0:
                del self._users[lane], self._places[lane]
