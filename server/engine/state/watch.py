"""The health of the states: how large they are, and whether they are finite, one conversation after the other.

A state that stopped being finite shows in the logits, which are looked at for every token (`Sampler.sample`). This
looks at the state itself, now and then, so that growth is seen before it becomes that. What is measured is read back
when the next one is, so that nobody waits for the device.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from server.engine.sequence import Sequence, SequenceStatus
from server.engine.types.position_stats import NORM_BUCKETS, NOTHING_OBSERVED, PositionHistogram, PositionRecorder

INTERVAL_S = 1.0


class StateProbe(Protocol):
    """Measures slots; `server.engine.state.norm.StateNorm`, or a test's own."""

    def launch(self, slot: int) -> None:
        """Starts measuring a slot as the steps launched so far leave it."""

    def collect(self) -> float:
        """The L2 norm of what was launched last; NaN or infinity if anything in it is not finite."""


class NoWatch:
    """Looks at nothing."""

    norms = NOTHING_OBSERVED
    largest_norm = 0.0

    def turn(self, running: Iterable[Sequence]) -> Sequence | None:
        return None


@dataclass(frozen=True, slots=True)
class _Measured:
    sequence: Sequence
    position: int


class StateWatch:
    """Takes one running conversation after the other, about one a second."""

    def __init__(self, probe: StateProbe, *, interval_s: float = INTERVAL_S) -> None:
        self._probe = probe
        self._interval_s = interval_s
        self._next_s = 0.0
        self._last_slot = 0
        self._measured: _Measured | None = None
        self._norms = PositionRecorder(NORM_BUCKETS)
        self.largest_norm = 0.0

    @property
    def norms(self) -> PositionHistogram:
        """Of all finite states that were measured."""
        return self._norms.histogram()

    def turn(self, running: Iterable[Sequence]) -> Sequence | None:
        """Between two steps: reads the last measurement and starts another, when it is time.

        Returns:
            A sequence that still runs and whose state is not finite; None: there is none, as far as is known.
        """
        now = time.monotonic()
        if now < self._next_s:
            return None
        self._next_s = now + self._interval_s
        ill = self._collect()
        # In the order of the slots, so that everybody's turn comes. One that has fed nothing has no state yet.
        slots = {sequence.slot: sequence for sequence in running if sequence.num_fed > sequence.num_skipped}
        if slots:
            slot = min((slot for slot in slots if slot > self._last_slot), default=min(slots))
            self._last_slot = slot
            self._measured = _Measured(slots[slot], slots[slot].start.position + slots[slot].num_fed)
            self._probe.launch(slot)
        return ill

    def _collect(self) -> Sequence | None:
        measured, self._measured = self._measured, None
        if measured is None:
            return None
        norm = self._probe.collect()
        if math.isfinite(norm):
            self._norms.observe(measured.position, norm)
            self.largest_norm = max(self.largest_norm, norm)
            return None
        return None if measured.sequence.status is SequenceStatus.FINISHED else measured.sequence
