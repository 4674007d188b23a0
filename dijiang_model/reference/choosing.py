"""Greedy choices, one number after the other."""

import math

from torch import Tensor


def greedy_token(logits: Tensor) -> int | None:
    """Place of the first of the largest numbers of [vocab]; None if any number is not finite."""
    values = logits.tolist()
    return values.index(max(values)) if all(math.isfinite(value) for value in values) else None
