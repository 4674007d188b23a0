"""Rounding of states, number by number: the ground truth for `ops.torch.rounding` and the kernels."""

import math
import struct

import torch
from torch import Tensor


def round_stochastically_naive(x: Tensor, position: int) -> Tensor:
    """One head's S [K, V] fp32 -> bf16, after the token at `position`."""
    values = [_rounded(float(value), place, position) for place, value in enumerate(x.flatten())]
    return torch.tensor(values).view(x.shape).to(torch.bfloat16)


def _rounded(value: float, place: int, position: int) -> float:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    if bits & 0x7F80_0000 == 0x7F80_0000:
        return value
    return float(struct.unpack("<f", struct.pack("<I", (bits + _chance(place, position)) & 0xFFFF_0000))[0])


def _chance(place: int, position: int) -> int:
    x = (place * 0x9E3779B1 + position * 0x85EBCA6B) % 2**32
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x >> 16


def round_row_naive(row: list[float], largest_code: int = 127) -> tuple[list[int], float]:
    """A key or a value of one head -> codes up to the largest and their scale; both are rounded to fp32 on the way."""
    values = torch.tensor(row)
    if not bool(values.isfinite().all()):
        return [0] * len(row), math.nan
    largest = values.abs().max()
    if largest == 0:
        return [0] * len(row), 0.0
    inverse = torch.tensor(float(largest_code)) / largest
    return [round(float(value * inverse)) for value in values], float(largest / largest_code)
