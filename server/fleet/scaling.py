"""How many engines there are to be: by busy slots and by requests that wait."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

SLOTS, BUSY = "slots", "busy"
"""What each replica tells of itself: its slots; those in use and the requests that wait for one."""


class SlotPolicy:
    """A policy of Ray Serve's autoscaler, asked ten times a second. Ray itself keeps to the limits and the delays.

    It answers by what it sees and remembers nothing: Ray follows a number that was wanted all through a delay, so it
    would never follow a policy with a delay of its own.
    """

    def __init__(self, *, target_load: float) -> None:
        self._target_load = target_load

    def __call__(self, context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        """The number of engines with whom the busy slots are the wanted share of all, and what to remember: nothing."""
        told = context.aggregated_metrics or {}
        slots, busy = told.get(SLOTS, {}), told.get(BUSY, {})
        present = int(context.target_num_replicas)
        if not sum(slots.values()):
            return present, {}
        # What waits at the front has not come to an engine yet.
        used = sum(busy.values()) + float(context.total_queued_requests or 0.0)
        per_engine = sum(slots.values()) / len(slots)
        wanted = max(1, math.ceil(used / (per_engine * self._target_load)))
        have_all_told = len(slots) >= context.current_num_replicas
        return wanted if have_all_told else max(wanted, present), {}
