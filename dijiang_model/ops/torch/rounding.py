"""States in fewer bits.

Keys and values of the window in int8: to the nearest of 255 codes, once, with a scale for each row.

Running sums in bf16: stochastic rounding, so that a sum that is rounded after every token keeps its mean.

To the nearest number, what a token adds below half a unit in the last place is lost, and so is a decay that takes off
less: where the half-life is long the error grows without end (see `docs/log`). Here the 16 bits that bf16 drops are the
chance of going up. The random bits are a hash of position and place, so that a state does not depend on its batch.
The compiled kernels do the same (`native/src/rounding.h`); the naive twin is `reference.rounding`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LARGEST_CODE = 127
_DROPPED = 0xFFFF
_EXPONENT = 0x7F80_0000
_WORD = 0xFFFF_FFFF


def round_stochastically(x: Tensor, positions: Tensor) -> Tensor:
    """[N, G, K, V] fp32 -> bf16 of the same shape; values that are not finite stay what they are.

    Args:
        positions: [N] int64, of the last token in each state.
    """
    bits = x.contiguous().view(torch.int32)
    places = torch.arange(x[0, 0].numel(), device=x.device).view(1, 1, *x.shape[2:])
    noise = random_bits(places, positions[:, None, None, None]).to(torch.int32)
    rounded = torch.where((bits & _EXPONENT) == _EXPONENT, bits, (bits + noise) & ~_DROPPED)
    return rounded.view(torch.float32).to(torch.bfloat16)


def random_bits(places: Tensor, positions: Tensor) -> Tensor:
    """16 random bits for each place in a head's S at each position; int64, broadcast."""
    x = (places * 0x9E3779B1 + positions * 0x85EBCA6B) & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x >> 16


@dataclass(frozen=True, slots=True)
class ExactRows:
    """Keys or values of the window over all slots, in whatever they are kept; read and written by index.

    Attributes:
        rows: [P, G, Z + W, d].
        scales: [P, G, Z + W] fp32 of rows in int8; None: a row is what it says.
    """

    rows: Tensor
    scales: Tensor | None

    def __getitem__(self, index: Any) -> Tensor:
        """Rows at an index of the first three dimensions, int8 widened to fp32."""
        return self.rows[index] if self.scales is None else widened_rows(self.rows[index], self.scales[index])

    def __setitem__(self, index: Any, new: Tensor) -> None:
        if self.scales is None:
            self.rows[index] = new.to(self.rows.dtype)
        else:
            self.rows[index], self.scales[index] = round_rows(new)

    def rounded(self, new: Tensor) -> Tensor:
        """What a later step is going to find of [..., d], in its dtype."""
        kept = new.to(self.rows.dtype) if self.scales is None else widened_rows(*round_rows(new))
        return kept.to(new.dtype)


def round_rows(x: Tensor, *, largest_code: int = _LARGEST_CODE) -> tuple[Tensor, Tensor]:
    """[..., d] -> int8 codes [..., d] and scales [...] fp32, the largest magnitude over the largest code.

    A row that is not finite becomes zeros with the scale NaN.
    """
    x = x.float()
    largest = x.abs().amax(-1)
    largest = torch.where(x.isfinite().all(-1), largest, torch.nan)
    bound = torch.full_like(largest, largest_code)  # a number in its place would be multiplied with a reciprocal
    inverse = torch.where(largest > 0, bound / largest, 0.0)
    codes = torch.where((largest > 0)[..., None], (x * inverse[..., None]).round(), 0.0)
    return codes.to(torch.int8), largest / bound


def widened_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """The same back in fp32."""
    return codes.float() * scales[..., None]


def packed_nibbles(codes: Tensor) -> Tensor:
    """Codes from -7 to 7 [..., d] -> [..., d / 2] uint8: two to a byte, 8 added, the even one below."""
    raised = (codes + 8).to(torch.uint8)
    return raised[..., ::2] | (raised[..., 1::2] << 4)


def unpacked_nibbles(packed: Tensor) -> Tensor:
    """The same back, int8."""
    both = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return both.to(torch.int8) - 8
