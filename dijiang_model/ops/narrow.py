"""States in bf16: rounding by chance, so that a sum that is rounded after every token keeps its mean.

To the nearest number, what a token adds below half a unit in the last place is lost, and so is a decay that takes off
less: where the half-life is long the error grows without end (`docs/log.md`). Here the 16 bits that bf16 drops are the
chance of going up. The dice are a hash of position and place, so that a state does not depend on its company.
The compiled kernels do the same (`native/src/narrow.h`); the naive twin is `reference.narrow`.
"""

import torch
from torch import Tensor

_DROPPED = 0xFFFF
_EXPONENT = 0x7F80_0000
_WORD = 0xFFFF_FFFF


def round_by_chance(x: Tensor, positions: Tensor) -> Tensor:
    """[N, G, K, V] fp32 -> bf16 of the same shape; values that are not finite stay what they are.

    Args:
        positions: [N] int64, of the last token in each state.
    """
    bits = x.contiguous().view(torch.int32)
    places = torch.arange(x[0, 0].numel(), device=x.device).view(1, 1, *x.shape[2:])
    dice = chances(places, positions[:, None, None, None]).to(torch.int32)
    rounded = torch.where((bits & _EXPONENT) == _EXPONENT, bits, (bits + dice) & ~_DROPPED)
    return rounded.view(torch.float32).to(torch.bfloat16)


def chances(places: Tensor, positions: Tensor) -> Tensor:
    """16 random bits for each place in a head's S at each position; int64, broadcast."""
    x = (places * 0x9E3779B1 + positions * 0x85EBCA6B) & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x >> 16
