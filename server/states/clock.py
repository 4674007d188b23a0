"""Clocks that are wrong for a while cost nothing.

A store's times are a wall clock's, which somebody may set: a minute with a wrong year must not delete what has a time
to live of days. Only time that a monotonic clock confirms counts as unused time. How long a server was not running
nothing confirms: its first hour waits with what would have expired meanwhile.
"""

import time
from collections.abc import Callable

TOLERANCE_S = 60.0
"""Steps below that are those of a clock that is kept right."""
LONG_GAP_S, GRACE_S = 86_400.0, 3600.0
"""After a gap so long, for how long after the start nothing expires for it."""


def seconds_since_boot() -> float:
    """Monotonic, and goes on while the machine sleeps where the system can tell."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class ClockWatch:
    """Compares a wall clock with a monotonic one."""

    def __init__(self, monotonic: Callable[[], float] = seconds_since_boot) -> None:
        """`monotonic`: seconds."""
        self._monotonic = monotonic
        self._last: tuple[float, float] | None = None
        self._gap_s = 0.0
        self._doubt_until = 0.0

    def begin(self, now: float, newest: float | None) -> None:
        """To be called at the start.

        Args:
            now: seconds since 1970.
            newest: when the store was used last, as it says; None: never.
        """
        self._last = now, self._monotonic()
        gap = 0.0 if newest is None else now - newest
        if gap > LONG_GAP_S:
            self._gap_s, self._doubt_until = gap, self._monotonic() + GRACE_S

    def step(self, now: float) -> float:
        """By how many seconds the wall clock was set since the last `note`; 0 where it only went on."""
        if self._last is None:
            return 0.0
        step = now - self._last[0] - (self._monotonic() - self._last[1])
        return step if abs(step) > TOLERANCE_S else 0.0

    def note(self, now: float) -> None:
        """The wall clock's time is taken as it is."""
        self._last = now, self._monotonic()

    def doubted_s(self) -> float:
        """How much of the past may not have been: what has expired in it is kept for now."""
        return self._gap_s if self._monotonic() < self._doubt_until else 0.0
