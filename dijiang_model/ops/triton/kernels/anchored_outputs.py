"""What the queries of segments answer in a layer with anchors: exact softmax over places and new tokens, which each
query sees while they are held, beside the linear part."""

import triton
import triton.language as tl

from dijiang_model.ops.triton.kernels.evictions import SIZES
from dijiang_model.ops.triton.kernels.parts import INDICES, rounded, turned
from dijiang_model.ops.triton.kernels.prefill_features import chunk_at
from dijiang_model.ops.triton.kernels.prefill_outputs import linear_tokens, mixing_weights, softmax_step
from dijiang_model.ops.triton.kernels.prefill_states import chunk_totals


@triton.jit
def candidate_rows(
    keys, values, key_scales, value_scales, near_keys, near_values, near_key_scales, near_value_scales, j, start, g,
    num_groups, num_columns,
    D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pointers [J] to keys, values and the scales of both of candidates j; `near_*` point to the head's first place."""
    is_new = j >= num_columns
    row = tl.where(is_new, start + j - num_columns, 0) * num_groups + g
    key_at = tl.where(is_new, keys + row * D, near_keys + j * D)
    value_at = tl.where(is_new, values + row * WIDTH, near_values + j * WIDTH)
    key_scale_at = tl.where(is_new, key_scales + row, near_key_scales + j)
    return key_at, value_at, key_scale_at, tl.where(is_new, value_scales + row, near_value_scales + j)


@triton.jit
def held_tokens(
    q, keys, values, key_scales, value_scales, near_keys, near_values, near_key_scales, near_value_scales, places,
    times, cos, sin, cos_sink, sin_sink, mix_weight, rows, row, count, offset, first, q_row, g, v0, num_groups,
    num_columns, like,
    D: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr, SINKS: tl.constexpr,
    C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """Softmax of C queries over the candidates that are held as each comes: positions `places` up to its own, `times`
    behind it. A block of candidates that no query sees is not read.

    q, `near_*`, places and times point to the head; `first` is the position of the segment's first token.

    Returns:
        [C, BLOCK_V] weighted values and [C] sums of weights, relative to each row's largest; [C] w_h . q.
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
    lane, start = tl.arange(0, BLOCK_J), row - offset
    at, end = (first + offset).to(tl.int32), num_columns + offset + count
    for step in range(0, end, BLOCK_J):
        j = step + lane
        place = tl.load(places + j, mask=j < end, other=-1)
        time = tl.minimum(tl.load(times + j, mask=j < end, other=0.0), 2147483647.0).to(tl.int32)
        is_open = (place >= SINKS) & (place < at + count) & (time > at)
        if tl.max(is_open.to(tl.int32), 0) > 0:
            key_at, value_at, key_scale_at, value_scale_at = candidate_rows(
                keys, values, key_scales, value_scales, near_keys, near_values, near_key_scales, near_value_scales, j,
                start, g, num_groups, num_columns, D, WIDTH,
            )  # fmt: skip
            seen = (place[None, :] <= at + i) & (at + i < time[None, :])
            largest, total, sums = softmax_step(
                queries, key_at, value_at, key_scale_at, value_scale_at, is_open, seen, c, col, root, largest, total,
                sums, like, D, PRECISION, EMULATED,
            )  # fmt: skip
    if SINKS > 0:  # never evicted
        query = turned(here, c, mask, cos_sink + angles, sin_sink + angles, q, q, HALF, 0, 1)
        queries = rounded(query, like, EMULATED)
        for step in range(0, SINKS, BLOCK_J):
            sink = step + lane
            key_at, value_at, key_scale_at, value_scale_at = candidate_rows(
                keys, values, key_scales, value_scales, near_keys, near_values, near_key_scales, near_value_scales,
                tl.where(sink < first, sink, num_columns + sink - first), start, g, num_groups, num_columns, D, WIDTH,
            )  # fmt: skip
            exists = (sink < SINKS) & (sink < at + count)
            largest, total, sums = softmax_step(
                queries, key_at, value_at, key_scale_at, value_scale_at, exists, sink[None, :] <= at + i, c, col, root,
                largest, total, sums, like, D, PRECISION, EMULATED,
            )  # fmt: skip
    return sums, total, mixed


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=INDICES)
def anchored_outputs_kernel(
    q, keys, values, key_scales, value_scales, phi_q, phi_in, v_in, chunk_states, chunk_normalisers, out, slots,
    positions, cos, sin, cos_sink, sin_sink, log_decay, mix_bias, mix_weight, near_keys, near_values, near_key_scales,
    near_value_scales, candidate_places, times, first_place, chunk_sequence, chunk_offset, starts, q_row, q_head,
    keys_slot, values_slot, scales_slot, num_columns,
    R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr,
    SINKS: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_J: tl.constexpr, PRECISION: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Grid (M, H, blocks of columns): out [T, H, D], as `outputs_kernel`, of a layer with anchors.

    Args:
        keys, values, key_scales, value_scales: of the segments' own tokens: [T, G, D], [T, G, WIDTH] and [T, G].
        candidate_places, times: by segment [G, J + T], see `kernels.places` and `evictions_kernel`.
    """
    m, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_heads = tl.num_programs(1)
    num_groups, g = num_heads // R, h // R
    v0 = tl.program_id(2) * BLOCK_V
    n, offset, row, count = chunk_at(m, chunk_sequence, chunk_offset, starts, C)
    start, i = row - offset, tl.arange(0, C)
    rows = row + i
    width = num_columns + tl.load(starts + n + 1) - start
    segment = num_groups * (n * num_columns + start) + g * width
    slot, base = tl.load(slots + n), tl.load(first_place + g)
    number = slot * scales_slot + base
    sums, weights, mixed = held_tokens(
        q + h * q_head, keys, values, key_scales, value_scales, near_keys + slot * keys_slot + base * D,
        near_values + slot * values_slot + base * WIDTH, near_key_scales + number, near_value_scales + number,
        candidate_places + segment, times + segment, cos, sin, cos_sink, sin_sink, mix_weight + h * D, rows, row, count,
        offset, tl.load(positions + start), q_row, g, v0, num_groups, num_columns, phi_in,
        D, WIDTH, HALF, ROTATED, SINKS, C, BLOCK_D, BLOCK_V, BLOCK_J, PRECISION, EMULATED,
    )  # fmt: skip
    if K > 0:
        total, _ = chunk_totals(log_decay, log_decay, positions, rows, count, 0, g, num_groups, False, C)
        linear, linear_weights = linear_tokens(
            phi_q, phi_in, v_in, chunk_states, chunk_normalisers, total, rows, count, m, h, g, v0, num_heads,
            num_groups, num_groups * D, D, D, K, True, C, BLOCK_K, BLOCK_V, PRECISION, EMULATED,
        )  # fmt: skip
        mix = K * tl.exp(tl.load(mix_bias + h) + mixed)
        sums += mix[:, None] * linear
        weights += mix * linear_weights
    sums /= tl.where(i < count, weights, 1.0)[:, None]
    col = v0 + tl.arange(0, BLOCK_V)[None, :]
    here = out + (rows[:, None] * num_heads + h) * D + col
    tl.store(here, sums.to(out.dtype.element_ty), mask=(i[:, None] < count) & (col < D))
