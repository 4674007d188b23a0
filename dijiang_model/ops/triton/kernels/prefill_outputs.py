"""Prefill, third part: what each chunk answers, from the state before it, from itself, and from the exact tokens."""

import triton
import triton.language as tl

from dijiang_model.ops.triton.kernels.parts import INDICES, codes_at, operand, rounded, scale_at, turned
from dijiang_model.ops.triton.kernels.prefill_features import chunk_at
from dijiang_model.ops.triton.kernels.prefill_states import chunk_totals


@triton.jit
def softmax_step(
    queries, key_at, value_at, key_scale_at, value_scale_at, exists, seen, c, col, root, largest, total, sums, like,
    D: tl.constexpr, PRECISION: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """One block of keys and values at the pointers [J], those that exist, into a running softmax; `seen` [C, J].

    Codes are multiplied as they are, exact in bf16; their scales [J] go to the scores and to the weights.
    """
    keys = operand(tl.load(key_at[:, None] + c, mask=exists[:, None] & (c < D), other=0.0), like, EMULATED)
    values = operand(codes_at(value_at[:, None], col, exists[:, None] & (col < D)), like, EMULATED)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * root
    if key_at.dtype.element_ty == tl.int8:
        scores *= scale_at(key_scale_at, exists, key_at)[None, :]
    scores = tl.where(exists[None, :] & seen, scores, float("-inf"))
    now = tl.maximum(largest, tl.max(scores, 1))
    base = tl.where(now == float("-inf"), 0.0, now)  # nothing seen yet: all weights are 0, none is NaN
    weights = tl.exp(scores - base[:, None])
    shrink = tl.exp(largest - base)
    total = total * shrink + tl.sum(weights, 1)
    if value_at.dtype.element_ty.primitive_bitwidth == 8:
        weights *= scale_at(value_scale_at, exists, value_at)[None, :]
    sums = tl.dot(rounded(weights, like, EMULATED), values, sums * shrink[:, None], input_precision=PRECISION)
    return now, total, sums


@triton.jit
def rows_at(
    rotated, v, key_scales, value_scales, kept_keys, kept_values, kept_key_scales, kept_value_scales, token, kept_row,
    start, v_row, g, num_groups,
    D: tl.constexpr,
):  # fmt: skip
    """Pointers [J] to keys, values and the scales of both: of `token` [J] in the segment that begins in row `start`,
    or, below 0, of `kept_row` [J] in the slot."""
    is_here = token >= 0
    own = (start + token) * num_groups + g
    key_at = tl.where(is_here, rotated + own * D, kept_keys + kept_row * D)
    value_at = tl.where(is_here, v + (start + token) * v_row, kept_values + kept_row * D)
    key_scale_at = tl.where(is_here, key_scales + own, kept_key_scales + kept_row)
    return key_at, value_at, key_scale_at, tl.where(is_here, value_scales + own, kept_value_scales + kept_row)


@triton.jit
def mixing_weights(q, query, mix_weight, c, mask, D: tl.constexpr, ROTATED: tl.constexpr):
    """[C] w_h . q of C queries at pointers q, of which `query` are the rotated ones."""
    if not ROTATED:
        query = tl.load(q + c, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(query * tl.load(mix_weight + c, mask=c < D, other=0.0), 1)


@triton.jit
def exact_tokens(
    q, rotated, v, key_scales, value_scales, near_keys, near_values, near_key_scales, near_value_scales, cos, sin,
    cos_sink, sin_sink, mix_weight, rows, row, count, offset, position, ring, ring_scales, q_row, v_row, g, v0,
    num_groups, like,
    D: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """Softmax of C queries over their windows and sinks.

    q and v point to the head, `ring` and `ring_scales` are the offsets of the exact rows and their scales, `position`
    is that of the segment's first token.

    Returns:
        [C, BLOCK_V] weighted values, [C] sums of weights, [C] w_h . q of the mixing weight.
    """
    i, c = tl.arange(0, C)[:, None], tl.arange(0, BLOCK_D)[None, :]
    col = v0 + tl.arange(0, BLOCK_V)[None, :]
    mask = (i < count) & (c < D)
    angles, here = rows[:, None] * HALF, q + rows[:, None] * q_row
    query = turned(here, c, mask, cos + angles, sin + angles, q, q, HALF, 0, 1)
    mixed = mixing_weights(here, query, mix_weight, c, mask, D, ROTATED)
    queries = rounded(query, like, EMULATED)
    root = 1.0 / tl.sqrt(D * 1.0)
    largest = tl.full([C], float("-inf"), tl.float32)
    total = tl.zeros([C], tl.float32)
    sums = tl.zeros([C, BLOCK_V], tl.float32)
    j, start = tl.arange(0, BLOCK_J), row - offset
    for step in range(0, C + WINDOW - 1, BLOCK_J):
        behind = step + j - (WINDOW - 1)  # of the chunk's first token
        token = offset + behind
        held = position + token
        exists = (held >= SINKS) & (behind < count)
        key_at, value_at, key_scale_at, value_scale_at = rows_at(
            rotated, v, key_scales, value_scales, near_keys + ring, near_values + ring, near_key_scales + ring_scales,
            near_value_scales + ring_scales, token, SINKS + held % WINDOW, start, v_row, g, num_groups, D,
        )  # fmt: skip
        seen = (behind[None, :] <= i) & (behind[None, :] > i - WINDOW)
        largest, total, sums = softmax_step(
            queries, key_at, value_at, key_scale_at, value_scale_at, exists, seen, c, col, root, largest, total, sums,
            like, D, PRECISION, EMULATED,
        )  # fmt: skip
    if SINKS > 0:
        query = turned(here, c, mask, cos_sink + angles, sin_sink + angles, q, q, HALF, 0, 1)
        queries = rounded(query, like, EMULATED)
        for step in range(0, SINKS, BLOCK_J):
            sink = step + j
            token = sink - position
            exists = (sink < SINKS) & (token < offset + count)
            key_at, value_at, key_scale_at, value_scale_at = rows_at(
                rotated, v, key_scales, value_scales, near_keys + ring, near_values + ring,
                near_key_scales + ring_scales, near_value_scales + ring_scales, token, sink, start, v_row, g,
                num_groups, D,
            )  # fmt: skip
            seen = token[None, :] <= offset + i
            largest, total, sums = softmax_step(
                queries, key_at, value_at, key_scale_at, value_scale_at, exists, seen, c, col, root, largest, total,
                sums, like, D, PRECISION, EMULATED,
            )  # fmt: skip
    return sums, total, mixed


@triton.jit
def linear_tokens(
    phi_q, phi_in, v_in, chunk_states, chunk_normalisers, total, rows, count, m, h, g, v0, num_heads, num_groups, v_row,
    v_head,
    D: tl.constexpr, K: tl.constexpr, DENOMINATOR: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """The linear part: [C, BLOCK_V] numerators and [C] denominators."""
    i = tl.arange(0, C)
    col = v0 + tl.arange(0, BLOCK_V)[None, :]
    has_row = i[:, None] < count
    before = tl.zeros([C, BLOCK_V], tl.float32)
    before_total = tl.zeros([C], tl.float32)
    scores = tl.zeros([C, C], tl.float32)
    for start in range(0, K, BLOCK_K):
        f = start + tl.arange(0, BLOCK_K)
        in_k = f[None, :] < K
        query_at = phi_q + (rows[:, None] * num_heads + h) * K + f[None, :]
        key_at = phi_in + (rows[:, None] * num_groups + g) * K + f[None, :]
        queries = operand(tl.load(query_at, mask=has_row & in_k, other=0.0), phi_in, EMULATED)
        keys = operand(tl.load(key_at, mask=has_row & in_k, other=0.0), phi_in, EMULATED)
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
        state_at = chunk_states + ((m * num_groups + g) * K + f[:, None]) * D + col
        state = tl.load(state_at, mask=(f[:, None] < K) & (col < D), other=0.0)
        before = tl.dot(queries, operand(state, phi_in, EMULATED), before, input_precision=PRECISION)
        if DENOMINATOR:
            z = tl.load(chunk_normalisers + (m * num_groups + g) * K + f, mask=f < K, other=0.0)
            before_total += tl.sum(queries.to(tl.float32) * z[None, :], 1)
    since = tl.exp(total)
    is_past = i[:, None] >= i[None, :]
    decays = tl.where(is_past, tl.exp(tl.minimum(total[:, None] - total[None, :], 0.0)), 0.0)
    scores *= decays
    values = tl.load(v_in + rows[:, None] * v_row + g * v_head + col, mask=has_row & (col < D), other=0.0)
    sums = tl.dot(
        rounded(scores, phi_in, EMULATED),
        operand(values, phi_in, EMULATED),
        before * since[:, None],
        input_precision=PRECISION,
    )
    return sums, tl.sum(scores, 1) + before_total * since


@triton.jit(do_not_specialize_on_alignment=INDICES)
def outputs_kernel(
    q, rotated, v, key_scales, value_scales, phi_q, phi_in, v_in, chunk_states, chunk_normalisers, out, slots,
    positions, cos, sin, cos_sink, sin_sink, log_decay, table_decay, mix_bias, mix_weight, near_keys, near_values,
    near_key_scales, near_value_scales, chunk_sequence, chunk_offset, starts, q_row, q_head, v_row, v_head, v_in_row,
    v_in_head, near_slot, scales_slot, num_entries,
    R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, TABLE: tl.constexpr, DENOMINATOR: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """Grid (M, H, blocks of columns): out [T, H, D], normalised, or raw sums without a denominator."""
    m = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    num_heads = tl.num_programs(1)
    num_groups = num_heads // R
    g = h // R
    v0 = tl.program_id(2) * BLOCK_V
    n, offset, row, count = chunk_at(m, chunk_sequence, chunk_offset, starts, C)
    i = tl.arange(0, C)
    rows = row + i
    total, _ = chunk_totals(log_decay, table_decay, positions, rows, count, num_entries, g, num_groups, TABLE, C)
    sums, weights = linear_tokens(
        phi_q, phi_in, v_in, chunk_states, chunk_normalisers, total, rows, count,
        m, h, g, v0, num_heads, num_groups, v_in_row, v_in_head,
        D, K, DENOMINATOR, C, BLOCK_K, BLOCK_V, PRECISION, EMULATED,
    )  # fmt: skip
    if WINDOW > 0:
        slot, exact_row = tl.load(slots + n), g * (SINKS + WINDOW)
        exact, exact_weights, mixed = exact_tokens(
            q + h * q_head, rotated, v + g * v_head, key_scales, value_scales, near_keys, near_values, near_key_scales,
            near_value_scales, cos, sin, cos_sink, sin_sink, mix_weight + h * D, rows, row, count, offset,
            tl.load(positions + row - offset), slot * near_slot + exact_row * D, slot * scales_slot + exact_row,
            q_row, v_row, g, v0, num_groups, phi_in,
            D, HALF, ROTATED, WINDOW, SINKS, C, BLOCK_D, BLOCK_V, BLOCK_J, PRECISION, EMULATED,
        )  # fmt: skip
        mix = K * tl.exp(tl.load(mix_bias + h) + mixed)
        sums = exact + mix[:, None] * sums
        weights = exact_weights + mix * weights
    if DENOMINATOR:
        sums /= tl.where(i < count, weights, 1.0)[:, None]
    col = v0 + tl.arange(0, BLOCK_V)[None, :]
    here = out + (rows[:, None] * num_heads + h) * D + col
    tl.store(here, sums.to(out.dtype.element_ty), mask=(i[:, None] < count) & (col < D))
