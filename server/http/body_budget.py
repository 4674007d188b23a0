"""Memory for the bodies of requests that are arriving, all together: slow senders cannot fill the server.

Bodies up to `SMALL_BYTES` are not counted: their number is that of connections, which are limited. Of the others no key
has more than half of the memory, where there are keys. When the last of many has ended, memory goes back to the system.
"""

import contextlib
import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Iterator

from server.errors import OverloadedError
from server.keys import EVERYBODY

SMALL_BYTES = 64 << 10
TRIM_FROM_BYTES = 32 << 20


class BodyBudget:
    """What bodies take while they arrive."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: of all of them."""
        self._max_bytes = max_bytes
        self._taken: Counter[str] = Counter()
        self._peak = 0

    @property
    def num_bytes(self) -> int:
        """Taken now."""
        return self._taken.total()

    @contextlib.contextmanager
    def claim(self, owner: str) -> Iterator[Callable[[int], None]]:
        """Counts a body of an owner for as long as the context is open.

        Yields:
            A function to be told of each piece, in bytes; raises `OverloadedError` if there is no room for it.
        """
        size = counted = 0

        def grow(num_bytes: int) -> None:
            nonlocal size, counted
            size += num_bytes
            if size <= SMALL_BYTES:
                return
            try:
                self._take(owner, size - counted)
            except OverloadedError:
                self._give_back(owner, counted)  # at once: what was kept of it is not needed any more
                counted = 0
                raise
            counted = size

        try:
            yield grow
        finally:
            self._give_back(owner, counted)

    def _take(self, owner: str, num_bytes: int) -> None:
        limit = self._max_bytes if owner == EVERYBODY else self._max_bytes // 2
        for taken, most, whose in (
            (self._taken[owner], limit, "of this key "),
            (self.num_bytes, self._max_bytes, ""),
        ):
            if taken + num_bytes > most:
                raise OverloadedError(
                    f"the bodies of requests {whose}that are arriving take {taken:,} bytes, limit {most:,}"
                )
        self._taken[owner] += num_bytes
        self._peak = max(self._peak, self.num_bytes)

    def _give_back(self, owner: str, num_bytes: int) -> None:
        if num_bytes == 0:
            return
        self._taken[owner] -= num_bytes
        if self._taken[owner] <= 0:
            del self._taken[owner]
        if not self._taken and self._peak >= TRIM_FROM_BYTES:
            self._peak = 0
            _trim()


def _trim() -> None:
    """Gives free memory back to the system: the allocator keeps it for itself where pieces were small."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not every C library has it
            ctypes.CDLL(None).malloc_trim(0)
