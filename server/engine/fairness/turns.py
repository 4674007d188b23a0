"""Work that a few hands do, in turns among keys. Standard library only; no thread, no clock.

Who has least under way is next, then who waits for longest; no key has all hands at once.
"""

from collections import Counter
from typing import Generic, TypeVar

Job = TypeVar("Job")


class Turns(Generic[Job]):
    """Jobs that wait, and how many of each key are under way."""

    def __init__(self, num_hands: int) -> None:
        """`num_hands`: jobs under way at once, >= 1."""
        self._num_hands = num_hands
        self._most_of_one = max(1, num_hands - 1)
        self._waiting: list[tuple[str, Job]] = []
        self._under_way: Counter[str] = Counter()

    def __len__(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    def num_of(self, key: str) -> int:
        """Jobs of one key, waiting and under way."""
        return self._under_way[key] + sum(other == key for other, _ in self._waiting)

    def add(self, key: str, job: Job) -> None:
        """Lets a job wait."""
        self._waiting.append((key, job))

    def start(self) -> tuple[str, Job] | None:
        """The next job and its key, under way from now on; None without a job or a hand."""
        if self._under_way.total() >= self._num_hands:
            return None
        open_ = [entry for entry in self._waiting if self._under_way[entry[0]] < self._most_of_one]
        if not open_:
            return None
        entry = min(open_, key=lambda one: self._under_way[one[0]])  # the first of the least
        self._waiting.remove(entry)
        self._under_way[entry[0]] += 1
        return entry

    def done(self, key: str) -> None:
        """Ends a job that was under way."""
        self._under_way[key] -= 1
        if self._under_way[key] == 0:
            del self._under_way[key]

    def discard(self, job: Job) -> None:
        """Forgets a job, if it waits."""
        self._waiting = [entry for entry in self._waiting if entry[1] != job]
