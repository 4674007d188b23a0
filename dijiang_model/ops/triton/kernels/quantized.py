"""Products of codes of 8 or 4 bits, and what else reads them: the embedding's rows, a matrix widened for once.

A *line* is a row of the codes as they lie in memory: one output in int8, outputs 2 i and 2 i + 1 in int4 (in the low
and high halves of its bytes). GROUP is 0 for int8.

Codes are whole numbers that bf16 and fp16 hold exactly, so the matrix units multiply codes themselves with the
activations and add up in fp32; a scale comes to the sum over its columns. Nothing is rounded but sums and results.
"""

import triton
import triton.language as tl


@triton.jit
def plain_dot(codes, x, total, EMULATED: tl.constexpr):
    """total + codes x; codes int8, x bf16 or fp16. The interpreter multiplies neither, nor makes bf16 of integers."""
    if EMULATED:
        return tl.dot(codes.to(tl.float32), x.to(tl.float32), total, input_precision="ieee")
    return tl.dot(codes.to(x.dtype), x, total)


@triton.jit
def added_product(codes, x, total, EMULATED: tl.constexpr):
    """total + codes [LINES, COLUMNS] x [COLUMNS, ROWS], fp32.

    x in fp32 is taken apart into three numbers of 8 bits each, which bf16 holds: together they are x.
    """
    if x.dtype == tl.float32:
        first = x.to(tl.bfloat16)
        rest = x - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        third = (rest - second.to(tl.float32)).to(tl.bfloat16)
        total = plain_dot(codes, third, total, EMULATED)
        total = plain_dot(codes, second, total, EMULATED)
        return plain_dot(codes, first, total, EMULATED)
    return plain_dot(codes, x, total, EMULATED)


@triton.jit
def halves(both, HAS_MINIMUMS: tl.constexpr):
    """Codes of the first and of the second output in a byte, int8: -8 to 7, with minimums 0 to 15."""
    low, high = (both & 15).to(tl.int8), (both >> 4).to(tl.int8)
    if not HAS_MINIMUMS:
        low, high = low - 8, high - 8
    return low, high


@triton.jit
def put(
    total, scales, bias, out, parts, output, row, num_rows, num_outputs, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """Stores sums [LINES, ROWS]: finished to out [rows, outputs], or a split's to parts [splits, rows, outputs]."""
    in_outputs = output < num_outputs
    mask = in_outputs[:, None] & (row < num_rows)[None, :]
    place = row[None, :] * num_outputs + output[:, None]
    if IS_SPLIT:
        own = tl.program_id(2).to(tl.int64) * num_rows * num_outputs
        tl.store(parts + own + place, total, mask=mask)
    else:
        if GROUP == 0:
            total *= tl.load(scales + output, mask=in_outputs, other=0.0)[:, None]
        if HAS_BIAS:
            total += tl.load(bias + output, mask=in_outputs, other=0.0).to(tl.float32)[:, None]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def quantized_product_kernel(
    x, codes, scales, minimums, bias, out, parts, num_rows, num_outputs, num_columns, columns_of_split,
    GROUP: tl.constexpr, HAS_MINIMUMS: tl.constexpr, HAS_BIAS: tl.constexpr, IS_SPLIT: tl.constexpr,
    LINES: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of lines, blocks of rows, splits of the columns): x [rows, columns] times the matrix transposed.

    COLUMNS is the group of int4. Codes are the left operand: their lines fill a matrix unit that few rows would not,
    and a row's sums go in one order whatever ROWS is.
    """
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = line if GROUP == 0 else 2 * line
    has_line, has_row = first < num_outputs, row < num_rows
    has_second = first + 1 < num_outputs
    num_groups = tl.cdiv(num_columns, COLUMNS)
    low_total = tl.zeros([LINES, ROWS], tl.float32)
    high_total = tl.zeros([LINES, ROWS], tl.float32)
    begin = tl.program_id(2) * columns_of_split
    for start in range(begin, tl.minimum(begin + columns_of_split, num_columns), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        has_column = column < num_columns
        tile = tl.load(
            codes + line[:, None] * num_columns + column[None, :], mask=has_line[:, None] & has_column[None, :], other=0
        )
        value = tl.load(
            x + row[None, :] * num_columns + column[:, None], mask=has_row[None, :] & has_column[:, None], other=0.0
        )
        if GROUP == 0:
            low_total = added_product(tile, value, low_total, EMULATED)
        else:
            low, high = halves(tile, HAS_MINIMUMS)
            nothing = tl.zeros([LINES, ROWS], tl.float32)
            low_sum = added_product(low, value, nothing, EMULATED)
            high_sum = added_product(high, value, nothing, EMULATED)
            at = first * num_groups + start // COLUMNS
            low_total += low_sum * tl.load(scales + at, mask=has_line, other=0.0).to(tl.float32)[:, None]
            at_second = at + num_groups
            high_total += high_sum * tl.load(scales + at_second, mask=has_second, other=0.0).to(tl.float32)[:, None]
            if HAS_MINIMUMS:
                sums = tl.sum(value.to(tl.float32), 0)[None, :]
                low_total += tl.load(minimums + at, mask=has_line, other=0.0).to(tl.float32)[:, None] * sums
                high_total += tl.load(minimums + at_second, mask=has_second, other=0.0).to(tl.float32)[:, None] * sums
    put(low_total, scales, bias, out, parts, first, row, num_rows, num_outputs, GROUP, HAS_BIAS, IS_SPLIT)
    if GROUP > 0:
        put(high_total, scales, bias, out, parts, first + 1, row, num_rows, num_outputs, GROUP, HAS_BIAS, IS_SPLIT)


@triton.jit(do_not_specialize=["num_rows"])
def sum_splits_kernel(
    parts, scales, bias, out, num_rows, num_outputs, num_splits,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of outputs, rows): parts [splits, rows, outputs] added up, first to last, and finished."""
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = output < num_outputs
    place = tl.program_id(1).to(tl.int64) * num_outputs + output
    step = num_rows.to(tl.int64) * num_outputs
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        total += tl.load(parts + split * step + place, mask=mask, other=0.0)
    if GROUP == 0:
        total *= tl.load(scales + output, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + output, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def widen_kernel(
    codes, scales, minimums, out, num_outputs, num_columns,
    GROUP: tl.constexpr, HAS_MINIMUMS: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of lines, blocks of columns): the matrix itself, [outputs, columns], rounded once to out's dtype."""
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    has_column = (column < num_columns)[None, :]
    first = line if GROUP == 0 else 2 * line
    has_line = (first < num_outputs)[:, None]
    tile = tl.load(codes + line[:, None] * num_columns + column[None, :], mask=has_line & has_column, other=0)
    place = first[:, None] * num_columns + column[None, :]
    if GROUP == 0:
        value = tile.to(tl.float32) * tl.load(scales + first[:, None], mask=has_line, other=0.0)
        tl.store(out + place, value.to(out.dtype.element_ty), mask=has_line & has_column)
    else:
        low, high = halves(tile, HAS_MINIMUMS)
        num_groups = tl.cdiv(num_columns, GROUP)
        at = first[:, None] * num_groups + (column // GROUP)[None, :]
        put_values(low, scales, minimums, at, out, place, has_line & has_column, HAS_MINIMUMS)
        has_second = (first + 1 < num_outputs)[:, None] & has_column
        put_values(high, scales, minimums, at + num_groups, out, place + num_columns, has_second, HAS_MINIMUMS)


@triton.jit
def put_values(codes, scales, minimums, at, out, place, mask, HAS_MINIMUMS: tl.constexpr):
    """Stores what codes of int4 stand for; `at`: the places of their scales."""
    value = codes.to(tl.float32) * tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_MINIMUMS:
        value += tl.load(minimums + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["ids"])
def look_up_kernel(ids, codes, scales, out, num_outputs, num_columns, COLUMNS: tl.constexpr):
    """Grid (ids, blocks of columns): rows of an int8 matrix; NaN for an id that it does not have."""
    place = tl.program_id(0).to(tl.int64)
    number = tl.load(ids + place)
    is_known = (number >= 0) & (number < num_outputs)
    line = tl.where(is_known, number, 0)
    scale = tl.where(is_known, tl.load(scales + line), float("nan"))
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < num_columns
    value = tl.load(codes + line * num_columns + column, mask=mask, other=0).to(tl.float32) * scale
    tl.store(out + place * num_columns + column, value.to(out.dtype.element_ty), mask=mask)
