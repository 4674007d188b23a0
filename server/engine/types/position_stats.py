"""What the engine counts by the position in a conversation: times of tokens, norms of states. Standard library only.

A model with a constant state costs the same at any position and keeps a state of bounded size; these numbers show it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

POSITION_STARTS = (1 << 10, 8 << 10, 64 << 10, 512 << 10)
"""First positions of all ranges but the first."""
POSITION_NAMES = ("0-1k", "1k-8k", "8k-64k", "64k-512k", "512k-")
"""Of the ranges."""
STEP_BUCKETS_S = (
    *(0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.0125, 0.015, 0.02, 0.025, 0.03, 0.04),
    *(0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
"""Upper bounds of times, seconds."""
NORM_BUCKETS = tuple(float(10**exponent) for exponent in range(9))
"""Upper bounds of norms."""


@dataclass(frozen=True, slots=True)
class PositionHistogram:
    """Histograms of one quantity, one for each range of positions that anything was observed in.

    Attributes:
        positions: numbers of the ranges (of `POSITION_NAMES`).
        counts: for each of them, how many values lie in each bucket; the last one has no upper bound.
        sums: for each of them, of the values.
    """

    positions: tuple[int, ...] = ()
    counts: tuple[tuple[int, ...], ...] = ()
    sums: tuple[float, ...] = ()


NOTHING_OBSERVED = PositionHistogram()


class PositionRecorder:
    """Collects one quantity by position."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """`bounds`: upper ones of the buckets, ascending."""
        self._bounds = bounds
        self._counts: dict[int, list[int]] = {}
        self._sums: dict[int, float] = {}

    def observe(self, position: int, value: float, *, times: int = 1) -> None:
        """Counts a value at a position in its conversation, >= 0; `times` over."""
        self._add(bisect_right(POSITION_STARTS, position), value, times)

    def _add(self, number: int, value: float, times: int) -> None:
        counts = self._counts.get(number)
        if counts is None:
            counts = self._counts[number] = [0] * (len(self._bounds) + 1)
        counts[bisect_left(self._bounds, value)] += times
        self._sums[number] = self._sums.get(number, 0.0) + value * times

    def observe_all(self, positions: Iterable[int], value: float) -> None:
        """Counts the same value at each of these positions."""
        in_range: dict[int, int] = {}  # a Counter takes 20 us to be made
        for position in positions:
            number = bisect_right(POSITION_STARTS, position)
            in_range[number] = in_range.get(number, 0) + 1
        for number, times in in_range.items():
            self._add(number, value, times)

    def histogram(self) -> PositionHistogram:
        """Everything so far."""
        numbers = tuple(sorted(self._counts))
        return PositionHistogram(
            numbers,
            tuple(tuple(self._counts[number]) for number in numbers),
            tuple(self._sums[number] for number in numbers),
        )
