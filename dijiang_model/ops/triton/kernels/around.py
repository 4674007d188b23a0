"""What lies around the attention and reads and writes each number once: residual and norm, the gated product."""

import triton
import triton.language as tl


@triton.jit
def normed_row(
    value, mask, weight, bias, c, eps, offset, WIDTH: tl.constexpr, RMS: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """RMSNorm or LayerNorm of one token [BLOCK] fp32, 0 behind its WIDTH; `offset` is added to every weight."""
    if not RMS:
        value = tl.where(mask, value - tl.sum(value, 0) / WIDTH, 0.0)
    answer = value / tl.sqrt(tl.sum(value * value, 0) / WIDTH + eps)
    answer *= tl.load(weight + c, mask=mask, other=0.0).to(tl.float32) + offset
    if HAS_BIAS:
        answer += tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    return answer


@triton.jit
def residual_norm_kernel(
    x, delta, weight, bias, total, normed, eps, offset,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, RMS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid (T,): total = x + delta and its norm, [T, WIDTH] each; the norm reads the sum as it is stored."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask, row = c < WIDTH, t * WIDTH
    value = tl.load(x + row + c, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(delta + row + c, mask=mask, other=0.0).to(tl.float32)
    stored = value.to(total.dtype.element_ty)
    tl.store(total + row + c, stored, mask=mask)
    answer = normed_row(stored.to(tl.float32), mask, weight, bias, c, eps, offset, WIDTH, RMS, HAS_BIAS)
    tl.store(normed + row + c, answer.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def two_norms_kernel(
    x, weight_a, bias_a, weight_b, bias_b, normed_a, normed_b, eps_a, eps_b, offset_a, offset_b,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, RMS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid (T,): two norms of the same [T, WIDTH]."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask, row = c < WIDTH, t * WIDTH
    value = tl.load(x + row + c, mask=mask, other=0.0).to(tl.float32)
    answer = normed_row(value, mask, weight_a, bias_a, c, eps_a, offset_a, WIDTH, RMS, HAS_BIAS)
    tl.store(normed_a + row + c, answer.to(normed_a.dtype.element_ty), mask=mask)
    answer = normed_row(value, mask, weight_b, bias_b, c, eps_b, offset_b, WIDTH, RMS, HAS_BIAS)
    tl.store(normed_b + row + c, answer.to(normed_b.dtype.element_ty), mask=mask)


@triton.jit
def gated_product_kernel(gate, up, out, width, gate_row, up_row, BLOCK: tl.constexpr):
    """Grid (T, blocks of the width): SiLU(gate) * up, not rounded in between; `gate_row`, `up_row`: from row to row."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < width
    opening = tl.load(gate + t * gate_row + c, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(up + t * up_row + c, mask=mask, other=0.0).to(tl.float32)
    answer = opening / (1.0 + tl.exp(-opening)) * factor
    tl.store(out + t * width + c, answer.to(out.dtype.element_ty), mask=mask)


@triton.jit
def row_product(x, weight, width, BLOCK: tl.constexpr):
    """The product of two rows of `width` numbers at pointers, in fp32."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        mask = c < width
        value = tl.load(x + c, mask=mask, other=0.0).to(tl.float32)
        total += value * tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def wide_product_kernel(x, weight, out, x_row, width, BLOCK: tl.constexpr):
    """Grid (T, R): out [T, R] = x weight^T in fp32; weight [R, width], rows of x `x_row` apart."""
    t, r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    product = row_product(x + t * x_row, weight + r * width, width, BLOCK)
    tl.store(out + t * tl.num_programs(1) + r, product.to(out.dtype.element_ty))


@triton.jit
def grid_scores_kernel(x, weight, bias, out, x_row, width, grid, inverse, BLOCK: tl.constexpr):
    """Grid (T, G): out [T, G] = x weight^T + bias in fp32, each to the nearest multiple of `grid`, ties to even.

    weight [G, width] and bias [G] fp32, rows of x `x_row` apart; `inverse` = 1 / grid.
    """
    t, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    score = row_product(x + t * x_row, weight + g * width, width, BLOCK) + tl.load(bias + g)
    whole = (score * inverse + 12582912.0) - 12582912.0
    tl.store(out + t * tl.num_programs(1) + g, whole * grid)
