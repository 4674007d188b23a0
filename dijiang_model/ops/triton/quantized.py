"""Products with rounded weights: launches `kernels.quantized`, each of its kernels where it is the better choice.

- Up to `ROWS_AT_ONCE` rows, those of decoding: codes are read once; where there are few outputs of a large matrix the
  columns are split over programs, whose sums a second launch adds up in order. Splits and tiles but for their rows
  follow from the matrix and the dtype alone, so a row is added up in the same order beside any others.
- Below `WIDENED_FROM` rows: the same kernel in larger tiles, not split.
- From there on: the matrix is widened once, into memory of its own for as long as the product takes, and torch
  multiplies.

No answer depends on which program comes first, nothing asks the device, and memory comes from torch's allocator: all of
it may be recorded.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn import functional
from triton import knobs

from dijiang_model.ops.quantized import QuantizedMatrix
from dijiang_model.ops.triton.device import OPTIONS, on_device_of
from dijiang_model.ops.triton.kernels.quantized import (
    look_up_kernel,
    quantized_product_kernel,
    sum_splits_kernel,
    widen_kernel,
)

ROWS_AT_ONCE = 64
"""Of a decode step, whose codes are read once for all of them."""
WIDENED_FROM = 1024
"""Rows from which writing the matrix out and reading it again, 4 bytes a weight, is little beside the product: some
30 us of 100 for 4,096 x 4,096 weights and 2,048 rows at the rates of an H100. To be measured."""
PROGRAMS = 256
"""About so many are wanted of a decode product: two for each of an H100's 132 multiprocessors."""
SHARED_BYTES = 48 << 10
"""Of a program, for tiles on their way: two programs then keep enough of them there to hide the memory's latency."""
UNSPLIT_BYTES = 2 << 20
"""A matrix of so many bytes is one launch: the busiest of its programs reads for about a microsecond, and a second
launch would take longer than splitting saves. To be measured."""
NARROWEST_OPERAND = 16
FP32_ROWS = 32
"""Of a tile: rows of fp32 are three operands each, and more would not fit into a thread's registers."""
SUM_BLOCK, WIDEN_BLOCK, LOOK_UP_BLOCK = 256, (16, 256), 1024


@dataclass(frozen=True, slots=True)
class ProductBlocks:
    """How a product is cut.

    Attributes:
        lines, columns, rows: of a tile; powers of two. `columns` is the group of int4.
        columns_of_split: a multiple of `columns`.
        splits: of the columns, each at least one tile wide.
        warps, stages: of a program; tiles on their way at a time.
    """

    lines: int
    columns: int
    rows: int
    columns_of_split: int
    splits: int
    warps: int
    stages: int

    @classmethod
    def of(cls, matrix: QuantizedMatrix, num_rows: int, dtype: torch.dtype) -> "ProductBlocks":
        """For less than `WIDENED_FROM` rows of this dtype."""
        most_rows = FP32_ROWS if dtype == torch.float32 else 64
        if num_rows > ROWS_AT_ONCE:
            return cls._of_many(matrix, most_rows)
        lines = 64 if matrix.num_lines >= 2048 else 32
        is_long = matrix.num_columns >= 2048 and dtype != torch.float32
        columns = matrix.group_size or (128 if is_long else 64)
        tiles = triton.cdiv(matrix.num_columns, columns)
        rows = min(most_rows, max(NARROWEST_OPERAND, triton.next_power_of_2(num_rows)))
        tile_bytes = columns * (lines + rows * dtype.itemsize)
        is_small = matrix.num_lines * matrix.num_columns <= UNSPLIT_BYTES
        num_splits = 1 if is_small else triton.cdiv(PROGRAMS, triton.cdiv(matrix.num_lines, lines))
        tiles_of_split = triton.cdiv(tiles, num_splits)
        return cls(
            lines=lines,
            columns=columns,
            rows=rows,
            columns_of_split=tiles_of_split * columns,
            splits=triton.cdiv(tiles, tiles_of_split),
            warps=4,
            stages=max(3, min(8, SHARED_BYTES // tile_bytes)),
        )

    @classmethod
    def _of_many(cls, matrix: QuantizedMatrix, most_rows: int) -> "ProductBlocks":
        columns = matrix.group_size or 64
        return cls(
            lines=64 if matrix.group_size > 0 else 128,
            columns=columns,
            rows=most_rows,
            columns_of_split=triton.cdiv(matrix.num_columns, columns) * columns,
            splits=1,
            warps=8,
            stages=3,
        )


def product(x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None) -> Tensor:
    """x W^T + bias: [..., columns] -> [..., outputs] in x's dtype, bf16, fp16 or fp32.

    Sums are fp32. Below `WIDENED_FROM` rows neither weights nor activations are rounded; from there on the weights are
    rounded to x's dtype.
    """
    rows = x.reshape(-1, matrix.num_columns).contiguous()
    if len(rows) >= WIDENED_FROM:
        return functional.linear(x, widened(matrix, x.dtype), None if bias is None else bias.to(x.dtype))
    out = torch.empty((len(rows), matrix.num_outputs), dtype=x.dtype, device=x.device)
    if out.numel() > 0:
        _launch(rows, matrix, bias, out, ProductBlocks.of(matrix, len(rows), x.dtype))
    return out.view(*x.shape[:-1], matrix.num_outputs)


def widened(matrix: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """[outputs, columns], the weights that the codes stand for, each rounded once."""
    shape = (matrix.num_outputs, matrix.num_columns)
    out = torch.empty(shape, dtype=dtype, device=matrix.codes.device)
    lines, columns = WIDEN_BLOCK
    grid = (triton.cdiv(matrix.num_lines, lines), triton.cdiv(matrix.num_columns, columns))
    with on_device_of(matrix.codes):
        widen_kernel[grid](
            matrix.codes,
            matrix.scales,
            _minimums(matrix),
            out,
            *shape,
            GROUP=matrix.group_size,
            HAS_MINIMUMS=matrix.minimums is not None,
            LINES=lines,
            COLUMNS=columns,
            num_warps=4,
            **OPTIONS,
        )
    return out


def looked_up(ids: Tensor, matrix: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """Rows [...] int64 of an int8 matrix -> [..., columns] of `dtype`; NaN for those that there are not."""
    assert matrix.group_size == 0, "embeddings are int8"
    out = torch.empty((*ids.shape, matrix.num_columns), dtype=dtype, device=ids.device)
    if out.numel() > 0:
        with on_device_of(ids):
            look_up_kernel[(ids.numel(), triton.cdiv(matrix.num_columns, LOOK_UP_BLOCK))](
                ids.contiguous(),
                matrix.codes,
                matrix.scales,
                out,
                matrix.num_outputs,
                matrix.num_columns,
                COLUMNS=LOOK_UP_BLOCK,
                num_warps=4,
                **OPTIONS,
            )
    return out


def _launch(x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None, out: Tensor, blocks: ProductBlocks) -> None:
    num_rows, num_outputs = out.shape
    is_split, has_bias = blocks.splits > 1, bias is not None
    parts = out
    if is_split:
        parts = torch.empty((blocks.splits, num_rows, num_outputs), dtype=torch.float32, device=x.device)
    added = matrix.scales if bias is None else bias  # never read where there is none
    grid = (triton.cdiv(matrix.num_lines, blocks.lines), triton.cdiv(num_rows, blocks.rows), blocks.splits)
    with on_device_of(x):
        quantized_product_kernel[grid](
            x,
            matrix.codes,
            matrix.scales,
            _minimums(matrix),
            added,
            out,
            parts,
            num_rows,
            num_outputs,
            matrix.num_columns,
            blocks.columns_of_split,
            GROUP=matrix.group_size,
            HAS_MINIMUMS=matrix.minimums is not None,
            HAS_BIAS=has_bias,
            IS_SPLIT=is_split,
            LINES=blocks.lines,
            COLUMNS=blocks.columns,
            ROWS=blocks.rows,
            EMULATED=knobs.runtime.interpret,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            **OPTIONS,
        )
        if is_split:
            sum_splits_kernel[(triton.cdiv(num_outputs, SUM_BLOCK), num_rows)](
                parts,
                matrix.scales,
                added,
                out,
                num_rows,
                num_outputs,
                blocks.splits,
                GROUP=matrix.group_size,
                HAS_BIAS=has_bias,
                BLOCK=SUM_BLOCK,
                num_warps=4,
                **OPTIONS,
            )


def _minimums(matrix: QuantizedMatrix) -> Tensor:
    """The scales stand for none: never read."""
    return matrix.scales if matrix.minimums is None else matrix.minimums
