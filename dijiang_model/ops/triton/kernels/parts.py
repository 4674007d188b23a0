"""Pieces of kernels: rotary embedding while loading, features of one vector, matrix products."""

import triton
import triton.language as tl

INDICES = ("slots", "positions", "chunk_sequence", "chunk_offset", "starts", "first_chunks")
"""Arguments that are views into a step's one copy, 8 bytes a number: they begin on 16 bytes or between, as it happens.

Triton compiles a kernel anew for each pattern of aligned arguments: 2^5 of them in the middle of serving.
"""


@triton.jit
def channels(x, c, mask, up, low, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr):
    """x[c] in fp32; with a RANK (c 1-D then) x + U low, the linear branch's queries' update."""
    value = tl.load(x + c, mask=mask, other=0.0).to(tl.float32)
    if RANK > 0:
        r = tl.arange(0, BLOCK_RANK)
        in_rank = r < RANK
        weights = tl.load(up + c[:, None] * RANK + r[None, :], mask=mask[:, None] & in_rank[None, :], other=0.0)
        value += tl.sum(weights * tl.load(low + r, mask=in_rank, other=0.0)[None, :], 1)
    return value


@triton.jit
def turned(x, c, mask, cos, sin, up, low, HALF: tl.constexpr, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr):
    """Channels c of x rotated by its angles (half-split pairing); fp32.

    x, cos and sin are pointers, or columns of them against a row c.
    """
    value = channels(x, c, mask, up, low, RANK, BLOCK_RANK)
    if HALF > 0:
        is_first = c < HALF
        turns = mask & (c < 2 * HALF)
        pair = channels(x, tl.where(is_first, c + HALF, c - HALF), turns, up, low, RANK, BLOCK_RANK)
        angle = tl.where(is_first, c, c - HALF)
        cosine = tl.load(cos + angle, mask=turns, other=1.0)
        sine = tl.load(sin + angle, mask=turns, other=0.0)
        value = value * cosine + tl.where(is_first, -pair, pair) * sine
    return value


@triton.jit
def turned_back(x, c, mask, cos, sin, late_cos, late_sin, HALF: tl.constexpr):
    """Channels c of a rotated x without its rotation; cos and sin are the angles of a token that came later.

    late_cos, late_sin: [HALF], the angles of as many positions as lie between the two.
    """
    value = tl.load(x + c, mask=mask, other=0.0).to(tl.float32)
    if HALF > 0:
        is_first = c < HALF
        turns = mask & (c < 2 * HALF)
        pair = tl.load(x + tl.where(is_first, c + HALF, c - HALF), mask=turns, other=0.0).to(tl.float32)
        angle = tl.where(is_first, c, c - HALF)
        in_late = angle < HALF
        cosine = tl.load(cos + angle, mask=turns, other=1.0)
        sine = tl.load(sin + angle, mask=turns, other=0.0)
        late_cosine = tl.load(late_cos + angle, mask=in_late, other=1.0)
        late_sine = tl.load(late_sin + angle, mask=in_late, other=0.0)
        own_cosine = cosine * late_cosine + sine * late_sine
        own_sine = sine * late_cosine - cosine * late_sine
        value = value * own_cosine + tl.where(is_first, pair, -pair) * own_sine
    return value


@triton.jit
def positive(logits, in_k, EXP: tl.constexpr, AXIS: tl.constexpr):
    """exp of logits, or softmax over the features; 0 outside of them."""
    logits = tl.where(in_k, logits, float("-inf"))
    if EXP:
        return tl.exp(logits)
    weights = tl.exp(logits - tl.expand_dims(tl.max(logits, AXIS), AXIS))
    return weights / tl.expand_dims(tl.sum(weights, AXIS), AXIS)


@triton.jit
def features(
    x, cos, sin, up, low, late_cos, late_sin, basis, nodes, log_weights, scale, width,
    D: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr, RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr, EXP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """phi of one vector x [D], rotated (or rotated BACK) while loading: [BLOCK_K] fp32, 0 behind K.

    x is read up to `width`, D or 0; the rest counts as zeros.

    Multiply-adds rather than a matrix product: exact in fp32, and a single row would leave a matrix unit idle.
    """
    f = tl.arange(0, BLOCK_K)
    in_k = f < K
    sums = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    for start in range(0, D, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        in_d = c < D
        has_x = c < width
        if BACK:
            value = turned_back(x, c, has_x, cos, sin, late_cos, late_sin, HALF)
        else:
            value = turned(x, c, has_x, cos, sin, up, low, HALF, RANK, BLOCK_RANK)
        # The same for every row and layer of the device: worth its place in the caches.
        tile = tl.load(
            basis + c[:, None] * K + f[None, :],
            mask=in_d[:, None] & in_k[None, :],
            other=0.0,
            eviction_policy="evict_last",
        )
        sums += value[:, None] * tile
    radii = tl.load(nodes + f, mask=in_k, other=0.0) * scale
    logits = tl.sum(sums, 0) * radii + tl.load(log_weights + f, mask=in_k, other=0.0)
    return positive(logits, in_k, EXP, 0)


@triton.jit
def rounded(x, like, EMULATED: tl.constexpr):
    """x in the dtype that `like` points to, for a matrix product; EMULATED: its values, held in fp32.

    Triton's interpreter multiplies no bf16; products of bf16 numbers are exact in fp32, so nothing changes.
    """
    narrow = x.to(like.dtype.element_ty)
    if EMULATED:
        return narrow.to(tl.float32)
    return narrow


@triton.jit
def row_factors(value, exact, AXIS: tl.constexpr):
    """Of whole rows of fp32 values along AXIS: the factor that `rounded_as` takes, and the scale that goes with codes.

    For exact rows in int8 127 over the largest magnitude, and the inverse; a row that is not finite has the scale NaN,
    one of zeros the scale 0 (`ops.torch.rounding.round_rows`). 1 and 1 for others.
    """
    factor, scale = 1.0, 1.0
    if exact.dtype.element_ty == tl.int8:
        # Magnitudes are in the order of their bits, and NaN is the largest.
        most = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS)
        is_finite = most < 0x7F800000
        is_plain = is_finite & (most > 0)
        largest = tl.where(is_plain, most.to(tl.float32, bitcast=True), 1.0)
        # Divided exactly, as everywhere: `/` may be off by two units in the last place.
        factor = tl.where(is_plain, tl.div_rn(127.0, largest), 0.0)
        scale = tl.where(is_plain, tl.div_rn(largest, 127.0), tl.where(is_finite, 0.0, float("nan")))
    return factor, scale


@triton.jit
def rounded_as(value, exact, factor):
    """fp32 values as the exact rows hold them, in fp32 again: rounded to their dtype; in int8 without their scale.

    `factor`: the first of `row_factors`.
    """
    if exact.dtype.element_ty == tl.int8:
        # The bounds also keep product and sum apart: fused, a number beside a tie would go to the other side.
        bounded = tl.minimum(tl.maximum(tl.where(factor > 0, value, 0.0) * factor, -127.0), 127.0)
        value = (bounded + 12582912.0) - 12582912.0  # to an integer, ties to even
    return value.to(exact.dtype.element_ty).to(tl.float32)


@triton.jit
def scale_at(scales, mask, exact):
    """Scales of exact rows at pointers; 1 for rows that have none. 0 where masked."""
    scale = 1.0
    if exact.dtype.element_ty.primitive_bitwidth == 8:
        scale = tl.load(scales, mask=mask, other=0.0)
    return scale


@triton.jit
def codes_at(rows, c, mask):
    """Entries c of exact rows at pointers, 0 where masked; uint8: two codes of 4 bits to a byte, the even one below."""
    if rows.dtype.element_ty == tl.uint8:
        both = tl.load(rows + c // 2, mask=mask, other=0x88).to(tl.int32)
        codes = ((both >> (c % 2 * 4)) & 15) - 8
    else:
        codes = tl.load(rows + c, mask=mask, other=0.0)
    return codes


@triton.jit
def operand(x, like, EMULATED: tl.constexpr):
    """A loaded block as an operand of products in the dtype that `like` points to."""
    if EMULATED:
        return x.to(tl.float32)
    return x.to(like.dtype.element_ty)


@triton.jit
def stored(x, like, place, position):
    """fp32 values of a state in the dtype that `like` points to: bf16 stochastically (`ops.torch.rounding`).

    `place` [...] is each value's place in its head's S, `position` that of the last token in it.
    """
    if like.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        random = place.to(tl.uint32) * 0x9E3779B1 + position.to(tl.uint32) * 0x85EBCA6B
        random = (random ^ (random >> 16)) * 0x7FEB352D
        random = (random ^ (random >> 15)) * 0x846CA68B
        raised = (bits + (random >> 16).to(tl.int32)) & -65536
        is_finite = (bits & 0x7F800000) != 0x7F800000
        x = tl.where(is_finite, raised, bits).to(tl.float32, bitcast=True)
    return x.to(like.dtype.element_ty)
