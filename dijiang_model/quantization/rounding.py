"""Rounding weights to few bits: int8 with a scale per row, int4 with a scale, and perhaps a minimum, per group.

Everything is computed in fp32 on the CPU, block of rows by block of rows, so that a large matrix costs little
memory beside its result. Scales of groups are fp16; codes are chosen for the scale as it was rounded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dijiang_model.errors import QuantizationError

LARGEST_INT8 = 127
NUM_INT4_CODES = 16
INT4_ZERO = 8
"""The code of 0 without minimums: codes 0 to 15 stand for -8 to 7."""
BLOCK_ELEMENTS = 2**21


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """A weight is about `code * scale`.

    Attributes:
        codes: [R, C] int8, -127 to 127.
        scales: [R] fp32, >= 0; a row of zeros has scale 0.
    """

    codes: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True)
class Int4Groups:
    """A weight is about `code * scale + minimum`, without minimums `(code - 8) * scale`.

    Attributes:
        scales: [R, ceil(C / group)] fp16.
        minimums: the same shape, fp16; None: there are none.
    """

    scales: Tensor
    minimums: Tensor | None


def round_rows(weight: Tensor) -> Int8Rows:
    """int8 codes of [R, C], the largest weight of a row at 127."""
    scales = row_scales(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    divisors = torch.where(scales > 0, scales, 1.0)[:, None]
    for rows in _blocks(weight):
        codes[rows] = (weight[rows].float() / divisors[rows]).round().clamp(-LARGEST_INT8, LARGEST_INT8).to(torch.int8)
    return Int8Rows(codes, scales)


def row_scales(weight: Tensor) -> Tensor:
    """[R] fp32 scales of `round_rows`."""
    return torch.cat([weight[rows].float().abs().amax(dim=1) for rows in _blocks(weight)]) / LARGEST_INT8


def fit_groups(weight: Tensor, *, group_size: int, has_minimums: bool) -> Int4Groups:
    """Scales of each row's groups of neighbouring columns; the last group may be shorter.

    Without minimums the weight of largest magnitude gets the code 0, which stands for -8: its scale may be negative.
    With them the codes 0 and 15 are the group's smallest and largest weights.

    Raises:
        QuantizationError: weights beyond what fp16 holds.
    """
    fit = _ends if has_minimums else _largest
    num_groups = -(-weight.shape[1] // group_size)
    scales, minimums = (torch.empty((weight.shape[0], num_groups), dtype=torch.float16) for _ in range(2))
    for rows in _blocks(weight):
        found_scales, found_minimums = fit(weight[rows].float(), group_size)
        scales[rows], minimums[rows] = found_scales.half(), found_minimums.half()
    if not (scales.isfinite().all() and minimums.isfinite().all()):
        raise QuantizationError(f"weights up to {float(weight.abs().max()):g} are too large for scales in fp16")
    return Int4Groups(scales, minimums if has_minimums else None)


def group_codes(weight: Tensor, groups: Int4Groups, *, group_size: int) -> Tensor:
    """[R, C] uint8, 0 to 15: the nearest code of each weight."""
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for rows in _blocks(weight):
        scales = groups.scales[rows].float()
        divisor = torch.where(scales != 0, scales, 1.0)[..., None]
        values = _grouped(weight[rows].float(), group_size)
        if groups.minimums is None:
            places = values / divisor + INT4_ZERO
        else:
            places = (values - groups.minimums[rows].float()[..., None]) / divisor
        nearest = places.round().clamp(0, NUM_INT4_CODES - 1)
        codes[rows] = nearest.flatten(1)[:, : weight.shape[1]].to(torch.uint8)
    return codes


def group_values(codes: Tensor, groups: Int4Groups, *, group_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[R, C] codes -> [R, C], the weights that they stand for, computed in `dtype` on any device."""
    values = _grouped(codes.to(dtype), group_size)
    scales = groups.scales.to(dtype)[..., None]
    if groups.minimums is None:
        values = (values - INT4_ZERO) * scales
    else:
        values = values * scales + groups.minimums.to(dtype)[..., None]
    return values.flatten(1)[:, : codes.shape[1]]


def pack_pairs(codes: Tensor) -> Tensor:
    """[R, C] codes -> [ceil(R / 2), C] bytes: row 2 i in the low half of byte row i, row 2 i + 1 in the high half."""
    if codes.shape[0] % 2 == 1:
        codes = functional.pad(codes, (0, 0, 0, 1))
    return codes[0::2] | (codes[1::2] << 4)


def unpack_pairs(packed: Tensor, *, num_rows: int) -> Tensor:
    """[ceil(R / 2), C] bytes -> [R, C] codes, on any device."""
    pairs = torch.stack([packed & 15, packed >> 4], dim=1)  # [ceil(R / 2), 2, C]
    return pairs.flatten(0, 1)[:num_rows]


def squared_error(weight: Tensor, *, group_size: int, has_minimums: bool) -> float:
    """Sum of squares that int4 rounding takes off or adds to a weight [R, C]."""
    groups = fit_groups(weight, group_size=group_size, has_minimums=has_minimums)
    codes = group_codes(weight, groups, group_size=group_size)
    return float((group_values(codes, groups, group_size=group_size) - weight.float()).square().sum())


def _largest(part: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    values = _grouped(part, group_size)
    where = values.abs().argmax(dim=-1, keepdim=True)
    scales = values.gather(-1, where).squeeze(-1) / -INT4_ZERO
    return scales, torch.zeros_like(scales)


def _ends(part: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    # Places behind the last column hold its value, not 0, which would widen the range.
    missing = -part.shape[1] % group_size
    values = torch.cat([part, part[:, -1:].expand(-1, missing)], dim=1).unflatten(1, (-1, group_size))
    lowest, highest = torch.aminmax(values, dim=-1)
    return (highest - lowest) / (NUM_INT4_CODES - 1), lowest


def _grouped(part: Tensor, group_size: int) -> Tensor:
    """[R, C] -> [R, ceil(C / group), group], zeros behind the columns."""
    padded = functional.pad(part, (0, -part.shape[1] % group_size))
    return padded.reshape(len(part), padded.shape[1] // group_size, group_size)


def _blocks(weight: Tensor) -> list[slice]:
    step = max(1, BLOCK_ELEMENTS // max(weight.shape[1], 1))
    return [slice(first, first + step) for first in range(0, weight.shape[0], step)]
