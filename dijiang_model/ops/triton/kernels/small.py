"""Small kernels around the attention: the step's angles, the released read-out."""

import triton
import triton.language as tl

from dijiang_model.ops.triton.kernels.parts import INDICES


@triton.jit(do_not_specialize_on_alignment=INDICES)
def angles_kernel(
    positions, frequencies, cos, sin, cos_sink, sin_sink, last_sink, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    """Grid (T,): cosines and sines [T, HALF] of positions, and of positions capped to `last_sink`.

    In fp64 up to the rounding of the results: in fp32 a position of 10^6 is off by 0.06 rad.
    """
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_HALF)
    mask = c < HALF
    frequency = tl.load(frequencies + c, mask=mask, other=0.0)
    position = tl.load(positions + t)
    angle = position.to(tl.float64) * frequency
    tl.store(cos + t * HALF + c, tl.cos(angle).to(tl.float32), mask=mask)
    tl.store(sin + t * HALF + c, tl.sin(angle).to(tl.float32), mask=mask)
    angle = tl.minimum(position, last_sink).to(tl.float64) * frequency
    tl.store(cos_sink + t * HALF + c, tl.cos(angle).to(tl.float32), mask=mask)
    tl.store(sin_sink + t * HALF + c, tl.sin(angle).to(tl.float32), mask=mask)


@triton.jit
def gated_norm_kernel(
    attended, gate, weight, bias, out, eps,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (T,): SiLU(gate) * GroupNorm(attended), channels [GROUPS * WIDTH], each token by itself."""
    t = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_GROUPS)[:, None]
    member = tl.arange(0, BLOCK_WIDTH)[None, :]
    mask = (group < GROUPS) & (member < WIDTH)
    channel = group * WIDTH + member
    row = t * (GROUPS * WIDTH) + channel
    x = tl.load(attended + row, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, x - (tl.sum(x, 1) / WIDTH)[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / WIDTH
    normed = centred / tl.sqrt(variance + eps)[:, None]
    scale = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    opening = tl.load(gate + row, mask=mask, other=0.0).to(tl.float32)
    answer = opening / (1.0 + tl.exp(-opening)) * (normed * scale + shift)
    tl.store(out + row, answer.to(out.dtype.element_ty), mask=mask)
