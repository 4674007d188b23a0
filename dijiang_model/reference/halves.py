"""Products with bf16 weights as the kernels for CPUs compute them, number by number: the ground truth for `native`."""

import struct

import torch
from torch import Tensor


def half_naive(x: float) -> float:
    """The nearest number in bf16: of the 32 bits of x the upper 16, ties to even. x is finite in fp32."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    below, rest = bits & ~0xFFFF, bits & 0xFFFF
    is_odd = below >> 16 & 1 == 1
    rounded = below + 0x10000 if rest > 0x8000 or (rest == 0x8000 and is_odd) else below
    (value,) = struct.unpack("<f", struct.pack("<I", rounded))
    return float(value)


def half_product_naive(weight: Tensor, x: Tensor) -> Tensor:
    """Rows x [N, columns] fp32, each number rounded to bf16, times weight [rows, columns] bf16: [N, rows] fp64."""
    result = torch.zeros((len(x), len(weight)), dtype=torch.float64)
    for n, row in enumerate(x.tolist()):
        for output, numbers in enumerate(weight.double().tolist()):
            result[n, output] = sum(half_naive(value) * number for value, number in zip(row, numbers, strict=True))
    return result
