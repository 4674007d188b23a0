"""Quantized weights code by code, in fp64: the ground truth for `dijiang_model.quantization` and its kernels."""

import torch
from torch import Tensor

from dijiang_model.quantization.weight import Int4Weight, Int8Weight, QuantizedWeight


def weight_naive(weight: QuantizedWeight) -> Tensor:
    """[rows, columns] fp64, the numbers that the codes stand for."""
    values = torch.zeros((weight.rows, weight.columns), dtype=torch.float64)
    for row in range(weight.rows):
        for column in range(weight.columns):
            values[row, column] = _value(weight, row, column)
    return values


def product_naive(weight: QuantizedWeight, x: Tensor) -> Tensor:
    """x [N, columns] -> [N, rows] fp64, activations rounded to 16 bits as the kernels do it.

    A row's largest magnitude becomes 32,767; the others the nearest integer of its share.
    """
    scales = x.abs().amax(dim=1, keepdim=True).double() / 32767
    inverse = (32767 / x.abs().amax(dim=1, keepdim=True)).float()
    return (x * inverse).round().double() * scales @ weight_naive(weight).T


def code_product_naive(codes: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    """The same for int8 codes [rows, columns] and scales [rows] as the matrix unit does it, to the bit: [N, rows] fp32.

    Sums are whole numbers, rounded to fp32 once. x is finite.
    """
    result = torch.zeros((len(x), len(codes)))
    for n, row in enumerate(x.numpy()):
        most = abs(row).max()
        inverse = most.dtype.type(32767) / most if most > 0 else most  # torch takes a reciprocal first
        whole = torch.from_numpy((row * inverse).round()).long()
        result[n] = (codes.long() * whole).sum(dim=1).float() * (scales * float(most / most.dtype.type(32767)))
    return result


def _value(weight: QuantizedWeight, row: int, column: int) -> float:
    if isinstance(weight, Int8Weight):
        return int(weight.codes[row, column]) * float(weight.scales[row])
    assert isinstance(weight, Int4Weight)
    both = int(weight.codes[row // 2, column])
    code = both // 16 if row % 2 == 1 else both % 16
    group = column // weight.group_size
    scale = float(weight.scales[row, group])
    return (code - 8) * scale if weight.minimums is None else code * scale + float(weight.minimums[row, group])
