"""Drawn tokens, one number after the other."""

import math

from torch import Tensor


def sampled_token(
    logits: Tensor,
    *,
    uniform: float,
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """The token of [vocab] that `uniform`, in [0, 1), points at in the cumulated weights which the filters leave.

    Args:
        logits: not all of them -inf; temperature > 0.
        min_p: weights below this share of the largest are left out.
        top_k: the k-th largest logit and those of at least its size stay; None: all.
        top_p: the heaviest tokens that together reach this share stay, and those as heavy as the last; None: all.
    """
    values = logits.tolist()
    most = max(values)
    weights = [math.exp((value - most) / temperature) for value in values]
    weights = [weight if weight >= min_p else 0.0 for weight in weights]
    if top_k is not None and top_k < len(values):
        least = sorted(values, reverse=True)[top_k - 1]
        weights = [weight if value >= least else 0.0 for value, weight in zip(values, weights, strict=True)]
    if top_p is not None:
        wanted, mass, lightest = top_p * math.fsum(weights), 0.0, math.inf
        for weight in sorted(weights, reverse=True):
            if mass >= wanted and lightest < math.inf:
                break
            mass, lightest = mass + weight, weight
        weights = [weight if weight >= lightest else 0.0 for weight in weights]
    target, mass = uniform * math.fsum(weights), 0.0
    for token, weight in enumerate(weights):
        mass += weight
        if mass > target:
            return token
    return max(token for token, weight in enumerate(weights) if weight > 0)
