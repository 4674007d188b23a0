"""How many engines there are to be: by busy slots and by requests that wait."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

SLOTS, BUSY = "slots", "busy"
"""What each replica tells of itself: its slots; those in use and the requests that wait for one."""


def wanted_replicas(busy: float, slots: float, num_replicas: int, *, target_load: float) -> int:
    """Engines with whom the busy slots are the wanted share of all.

    Args:
        busy: slots in use and requests that wait, of all engines.
        slots: of all engines that have told theirs.
        num_replicas: that have.
    """
    if slots <= 0 or num_replicas == 0:
        return max(1, num_replicas)
    return max(1, math.ceil(busy / (slots / num_replicas * target_load)))


class SlotPolicy:
    """A policy of Ray Serve's autoscaler; Ray keeps to the limits and the delays."""

    def __init__(self, *, target_load: float, upscale_delay_s: float, downscale_delay_s: float) -> None:
        self._target_load = target_load
        self._delays = {True: upscale_delay_s, False: downscale_delay_s}

    def __call__(self, context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        """The number of replicas from now on, and what to remember."""
        told = context.aggregated_metrics or {}
        slots, busy = told.get(SLOTS, {}), told.get(BUSY, {})
        # What waits at the front has not come to an engine yet.
        waiting = float(context.total_queued_requests or 0.0)
        wanted = wanted_replicas(
            sum(busy.values()) + waiting, sum(slots.values()), len(slots), target_load=self._target_load
        )
        now, current = float(context.current_time or 0.0), context.target_num_replicas
        wanted = min(max(wanted, context.capacity_adjusted_min_replicas), context.capacity_adjusted_max_replicas)
        if wanted == current:
            return current, {}
        is_more = wanted > current
        state = context.policy_state
        since = state["since"] if state.get("is_more") == is_more else now
        if now - since >= self._delays[is_more]:
            return wanted, {}
        return current, {"is_more": is_more, "since": since}
