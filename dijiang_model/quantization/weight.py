"""A matrix of codes as a part of a network, which saves and loads like any other.

The compiled kernels multiply codes with 16-bit activations in exact integer sums, so that only the weights'
rounding is felt. On CUDA Triton's kernels read the codes (`ops.triton.quantized`). Without either the codes are widened
on the fly: the same answer.
"""

import ctypes
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from dijiang_model.native.library import load_library
from dijiang_model.native.structures import Matrix
from dijiang_model.ops.quantized import QuantizedMatrix
from dijiang_model.ops.selection import quantized_product, quantized_rows
from dijiang_model.quantization.config import Quantization
from dijiang_model.quantization.rounding import (
    Int4Groups,
    fit_groups,
    group_codes,
    group_values,
    pack_pairs,
    round_rows,
    unpack_pairs,
)

COLUMN_BLOCK = 64
"""The kernels read codes in whole blocks of this, the width of the widest instruction; zeros behind the columns."""


class QuantizedWeight(nn.Module):
    """Codes of a [rows, columns] matrix; buffers only, no gradients.

    Attributes:
        rows, columns: of the matrix that the codes stand for.
        dtype: of the unrounded weights around it.
        codes: see the subclasses.
        scales: see the subclasses.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, rows: int, columns: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows, self.columns, self.dtype = rows, columns, dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def num_bytes(self) -> int:
        """Memory of codes and scales."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())

    @abstractmethod
    def problems(self) -> list[str]:
        """What is inconsistent in codes and scales; empty when they could have been written by this code."""

    @abstractmethod
    def prepare(self) -> "QuantizedWeight":
        """Derives what the kernels need beside the codes; returns itself."""

    @abstractmethod
    def matrix(self, bias: int | None = None) -> Matrix:
        """As the kernels want it, after `prepare()`, on the CPU; it points into this object."""

    @property
    @abstractmethod
    def rounded(self) -> QuantizedMatrix:
        """As the operators want it."""

    @abstractmethod
    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, columns] on the codes' device."""

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias: [..., columns] -> [..., rows], in x's dtype and on its device."""
        library = load_library() if x.device.type == "cpu" and x.dtype == torch.float32 else None
        if library is None:
            return quantized_product(x, self.rounded, bias, widened=self.dequantized)
        x = x.contiguous()
        y = torch.empty((*x.shape[:-1], self.rows), dtype=torch.float32)
        matrix = self.matrix(None if bias is None else bias.data_ptr())
        num_rows, threads = x.numel() // self.columns, torch.get_num_threads()
        if library.dijiang_linear(ctypes.addressof(matrix), x.data_ptr(), num_rows, y.data_ptr(), threads):
            raise MemoryError(f"no memory for a product of {num_rows} rows")
        return y


class Int8Weight(QuantizedWeight):
    """One symmetric scale per row: a weight is about `code * scale`.

    Attributes:
        codes: [rows, columns] int8.
        scales: [rows] fp32.
    """

    def __init__(self, rows: int, columns: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(rows, columns, dtype=dtype)
        self.register_buffer("codes", torch.empty((rows, columns), dtype=torch.int8))
        self.register_buffer("scales", torch.empty(rows, dtype=torch.float32))
        self._padded: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor) -> "Int8Weight":
        """Rounds [rows, columns] on the CPU."""
        made = cls(*weight.shape)
        rounded = round_rows(weight.detach())
        made.codes, made.scales = rounded.codes, rounded.scales
        return made.prepare()

    def problems(self) -> list[str]:
        found = _bad_scales(self.scales, "scales") or _negative(self.scales)
        silent = self.scales == 0
        if not found and bool(self.codes[silent].any()):
            found.append("rows with scale 0 have codes")
        return found

    def prepare(self) -> "Int8Weight":
        if self.codes.device.type == "cpu":
            self._padded = _padded(self.codes)
        else:
            self.codes, self.scales = self.codes.contiguous(), self.scales.contiguous()
        return self

    @property
    def rounded(self) -> QuantizedMatrix:
        return QuantizedMatrix(self.codes, self.scales, None, self.rows, 0)

    def matrix(self, bias: int | None = None) -> Matrix:
        assert self._padded is not None
        return Matrix(
            codes=self._padded.data_ptr(),
            scales=self.scales.data_ptr(),
            bias=bias,
            rows=self.rows,
            columns=self.columns,
        )

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.codes.to(dtype) * self.scales.to(dtype)[:, None]

    def looked_up(self, rows: Tensor) -> Tensor:
        """Rows [...] int64 -> [..., columns] of this weight's dtype."""
        return quantized_rows(rows, self.rounded, self.dtype)


class Int4Weight(QuantizedWeight):
    """One scale per group of columns, and perhaps a minimum; see `rounding.Int4Groups`.

    Attributes:
        codes: [ceil(rows / 2), columns] uint8, two rows in a byte (`rounding.pack_pairs`).
        scales: [rows, groups] fp16.
        minimums: [rows, groups] fp16, or None.
    """

    minimums: Tensor | None

    def __init__(
        self, rows: int, columns: int, *, quantization: Quantization, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(rows, columns, dtype=dtype)
        self.group_size = quantization.group_size
        shape = (rows, -(-columns // self.group_size))
        self.register_buffer("codes", torch.empty((-(-rows // 2), columns), dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(shape, dtype=torch.float16))
        self.register_buffer("minimums", torch.empty(shape, dtype=torch.float16) if quantization.has_minimums else None)
        self._padded: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, quantization: Quantization) -> "Int4Weight":
        """Rounds [rows, columns] on the CPU."""
        made, size = cls(*weight.shape, quantization=quantization), quantization.group_size
        weight = weight.detach()
        groups = fit_groups(weight, group_size=size, has_minimums=quantization.has_minimums)
        made.codes = pack_pairs(group_codes(weight, groups, group_size=size))
        made.scales, made.minimums = groups.scales, groups.minimums
        return made.prepare()

    def problems(self) -> list[str]:
        found = _bad_scales(self.scales, "scales")
        if self.minimums is not None:
            found += _bad_scales(self.minimums, "minimums") + _negative(self.scales)
        return found

    def prepare(self) -> "Int4Weight":
        if self.codes.device.type == "cpu":
            self._padded = _padded(self.codes)
        else:
            self.codes, self.scales = self.codes.contiguous(), self.scales.contiguous()
            self.minimums = None if self.minimums is None else self.minimums.contiguous()
        return self

    @property
    def rounded(self) -> QuantizedMatrix:
        return QuantizedMatrix(self.codes, self.scales, self.minimums, self.rows, self.group_size)

    def matrix(self, bias: int | None = None) -> Matrix:
        assert self._padded is not None
        return Matrix(
            pairs=self._padded.data_ptr(),
            group_scales=self.scales.data_ptr(),
            group_minimums=None if self.minimums is None else self.minimums.data_ptr(),
            group_size=self.group_size,
            bias=bias,
            rows=self.rows,
            columns=self.columns,
        )

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = unpack_pairs(self.codes, num_rows=self.rows)
        return group_values(codes, Int4Groups(self.scales, self.minimums), group_size=self.group_size, dtype=dtype)


def quantized_weight(rows: int, columns: int, quantization: Quantization, *, dtype: torch.dtype) -> QuantizedWeight:
    """Empty codes, on torch's default device, to be loaded."""
    if quantization.weights == "int8":
        return Int8Weight(rows, columns, dtype=dtype)
    return Int4Weight(rows, columns, quantization=quantization, dtype=dtype)


def _padded(codes: Tensor) -> Tensor:
    """The codes themselves where their width is a whole number of blocks, as in real models; else a wider copy."""
    missing = -codes.shape[1] % COLUMN_BLOCK
    return functional.pad(codes, (0, missing)) if missing > 0 else codes.contiguous()


def _bad_scales(scales: Tensor, name: str) -> list[str]:
    return [] if bool(scales.isfinite().all()) else [f"{name} have values that are not finite"]


def _negative(scales: Tensor) -> list[str]:
    return ["scales have negative values"] if bool((scales < 0).any()) else []
