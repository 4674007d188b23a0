"""One token of each of N sequences in a layer with anchors: everything between the projections in one launch.

As `kernels.decode`, with places of its own for each key-value head (`ops.torch.places`): the token that leaves the
window joins the anchors or drives one out, and whoever is evicted enters the state.
"""

import triton
import triton.language as tl

from dijiang_model.ops.triton.kernels.decode import (
    joined,
    load_tile,
    new_row,
    scaled_queries,
    softmax_rows,
    store_tile,
)
from dijiang_model.ops.triton.kernels.evictions import priority_of
from dijiang_model.ops.triton.kernels.parts import INDICES, features, rounded_as


@triton.jit
def shared_score(recent, score, position, live, SPAN: tl.constexpr, BLOCK_R: tl.constexpr):
    """Notes a token's score; the largest of the last 2 SPAN + 1, which the token SPAN before it shares.

    `live`: 1, or 0 where nothing is to be written.
    """
    SIZE: tl.constexpr = 2 * SPAN + 1
    r = tl.arange(0, BLOCK_R)
    ago = (position % SIZE + SIZE - r) % SIZE
    is_earlier = (r < SIZE) & (ago > 0) & (position - ago >= 0)
    most = tl.max(tl.load(recent + r, mask=is_earlier, other=float("-inf")), 0)
    tl.store(recent + position % SIZE, score, mask=live > 0)
    return tl.maximum(most, score)


@triton.jit
def lowest_anchor(scores, places, start, limit, age, BLOCK_J: tl.constexpr):
    """Priority and column of the anchor that goes next, of the `limit` from column `start` on: of equals the oldest."""
    lane = tl.arange(0, BLOCK_J)
    best = tl.full([BLOCK_J], float("inf"), tl.float64)
    best_place = tl.full([BLOCK_J], 0x7FFFFFFF, tl.int32)
    best_column = tl.full([BLOCK_J], 0, tl.int64)
    for first in range(0, limit, BLOCK_J):
        j = first + lane
        place = tl.load(places + start + j, mask=j < limit, other=0x7FFFFFFF)
        score = tl.load(scores + start + j, mask=j < limit, other=float("inf"))
        priority = priority_of(score, place, age)
        is_lower = (priority < best) | ((priority == best) & (place < best_place))
        best = tl.where(is_lower, priority, best)
        best_place = tl.where(is_lower, place, best_place)
        best_column = tl.where(is_lower, start + j, best_column)
    lowest = tl.min(best, 0)
    oldest = tl.min(tl.where(best == lowest, best_place, 0x7FFFFFFF), 0)
    column = tl.max(tl.where((best == lowest) & (best_place == oldest), best_column, 0), 0)
    return lowest, column


@triton.jit
def turned_back_at(x, c, mask, position, frequencies, HALF: tl.constexpr):
    """Channels c of a rotated row of codes x without its rotation, that of `position`; fp32."""
    value = tl.load(x + c, mask=mask, other=0).to(tl.float32)
    if HALF > 0:
        is_first = c < HALF
        turns = mask & (c < 2 * HALF)
        pair = tl.load(x + tl.where(is_first, c + HALF, c - HALF), mask=turns, other=0).to(tl.float32)
        angle = tl.load(frequencies + tl.where(is_first, c, c - HALF), mask=turns, other=0.0)
        angle = angle * position.to(tl.float64)  # in fp32 a position of 10^6 is off by 0.06 rad
        cosine, sine = tl.cos(angle).to(tl.float32), tl.sin(angle).to(tl.float32)
        value = value * cosine + tl.where(is_first, pair, -pair) * sine
    return value


@triton.jit
def places_part(
    q, keys, values, key_scales, value_scales, cos, sin, cos_sink, sin_sink, mix_weight, position, window, used, left,
    v0,
    D: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr, SINKS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Exact softmax of one query over the first `used` columns, `left` of them anchors.

    Returns:
        [BLOCK_V] weighted values, their weights' sum, and w_h . q of the mixing weight.
    """
    query, sink_query, mixed = scaled_queries(
        q, cos, sin, cos_sink, sin_sink, mix_weight, D, HALF, ROTATED, SINKS, BLOCK_D
    )
    largest, total = float("-inf"), 0.0
    sums = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, used, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        ago = (position % window + window - (j - SINKS)) % window
        in_ring = (j >= SINKS) & (j < SINKS + window) & (position - ago >= SINKS)
        is_anchor = (j >= SINKS + window) & (j < SINKS + window + left)
        seen = (j < used) & (((j < SINKS) & (j <= position)) | in_ring | is_anchor)  # column 0 always is
        largest, total, sums = softmax_rows(
            query, sink_query, keys, values, key_scales, value_scales, j, seen, v0, largest, total, sums,
            D, SINKS, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    return sums, total, mixed


@triton.jit
def next_places(
    recent, scores, places, score, ages, position, window, limit, live,
    SINKS: tl.constexpr, SPAN: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Who leaves the window, and who is evicted for it; notes the new token's `score`.

    Returns:
        The ring's column that the new token takes; the place and the score of whoever has it; whether that one joins
        the anchors, and in which column; the column and the place of the evicted, and whether there is one; the score
        that the token SPAN before the new one shares.
    """
    shared = shared_score(recent, score, position, live, SPAN, BLOCK_R)
    leaving = position - window
    leaves = live * tl.where(leaving >= SINKS, 1, 0)
    own = tl.where(position < SINKS, position, SINKS + position % window)
    own_score = tl.load(scores + own, mask=live > 0, other=0.0)
    own_score = tl.where((SPAN > 0) & (leaving == position - SPAN), shared, own_score)
    own_place = tl.load(places + own, mask=live > 0, other=0)
    age = tl.load(ages)
    lowest, column = lowest_anchor(scores, places, SINKS + window, limit * leaves, age, BLOCK_J)
    is_full = leaving - SINKS >= limit
    priority = priority_of(own_score, own_place, age)
    wins = leaves * tl.where((is_full == 0) | ((priority >= lowest) & (limit > 0)), 1, 0)
    target = tl.where(is_full, column, position)  # places fill up in order: leaving + window
    is_evicted = leaves * tl.where(is_full, 1, 0)
    loser = tl.where(wins > 0, target, own)
    loser_place = tl.load(places + loser, mask=is_evicted > 0, other=0)
    return own, own_place, own_score, wins, target, loser, loser_place, is_evicted, shared


@triton.jit
def take_out(
    entering, keys, values, key_scales, value_scales, frequencies, loser, loser_place, is_evicted,
    D: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes key and value of the evicted to `entering` [2, D] fp32, the key without its rotation unless features are
    of rotated ones."""
    c = tl.arange(0, BLOCK_D)
    HALF_BACK: tl.constexpr = 0 if ROTATED else HALF
    mask = c < D * is_evicted
    key = turned_back_at(keys + loser * D, c, mask, loser_place, frequencies, HALF_BACK)
    key *= tl.load(key_scales + loser, mask=is_evicted > 0, other=0.0)
    value = tl.load(values + loser * D + c, mask=mask, other=0).to(tl.float32)
    value *= tl.load(value_scales + loser, mask=is_evicted > 0, other=0.0)
    tl.store(entering + c, key, mask=mask)
    tl.store(entering + D + c, value, mask=mask)


@triton.jit
def take_places(
    k, v, cos, sin, keys, values, key_scales, value_scales, places, scores, score, own, own_place, own_score, wins,
    target, shared, position, window, live,
    D: tl.constexpr, HALF: tl.constexpr, SINKS: tl.constexpr, SPAN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The one that stays takes its place among the anchors, and the new token takes over the one in the ring."""
    c = tl.arange(0, BLOCK_D)
    moves, width, known = c < D * live * wins, D * live, position - SPAN
    moved_key = tl.load(keys + own * D + c, mask=moves, other=0)
    moved_value = tl.load(values + own * D + c, mask=moves, other=0)
    moved_key_scale = tl.load(key_scales + own, mask=wins > 0, other=0.0)
    moved_value_scale = tl.load(value_scales + own, mask=wins > 0, other=0.0)
    k_kept, k_scale, v_factor, v_scale = new_row(k, v, cos, sin, keys, values, D, HALF, BLOCK_D)
    v_kept = rounded_as(tl.load(v + c, mask=c < D, other=0.0).to(tl.float32), values, v_factor)
    tl.debug_barrier()
    tl.store(keys + target * D + c, moved_key, mask=moves)
    tl.store(values + target * D + c, moved_value, mask=moves)
    tl.store(key_scales + target, moved_key_scale, mask=wins > 0)
    tl.store(value_scales + target, moved_value_scale, mask=wins > 0)
    tl.store(places + target, own_place, mask=wins > 0)
    tl.store(scores + target, own_score, mask=wins > 0)
    if SPAN > 0:
        known_column = SINKS + known % window
        tl.store(scores + known_column, shared, mask=(live > 0) & (known >= SINKS) & (known > position - window))
    tl.store(keys + own * D + c, k_kept.to(tl.int8), mask=c < width)
    tl.store(values + own * D + c, v_kept.to(tl.int8), mask=c < width)
    tl.store(key_scales + own, k_scale, mask=live > 0)
    tl.store(value_scales + own, v_scale, mask=live > 0)
    tl.store(places + own, position.to(tl.int32), mask=live > 0)
    tl.store(scores + own, score, mask=live > 0)
    tl.debug_barrier()


@triton.jit
def make_room(
    k, v, cos, sin, entering, recent, keys, values, key_scales, value_scales, places, scores, score, frequencies, ages,
    position, window, limit, live,
    D: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr, SINKS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gives the new token its place; key and value of whoever is evicted for it go to `entering` [2, D].

    Returns:
        The evicted token's position, and 1 if there is one, else 0.
    """
    own, own_place, own_score, wins, target, loser, loser_place, is_evicted, shared = next_places(
        recent, scores, places, score, ages, position, window, limit, live, SINKS, SPAN, BLOCK_J, BLOCK_R
    )
    take_out(
        entering, keys, values, key_scales, value_scales, frequencies, loser, loser_place, is_evicted,
        D, HALF, ROTATED, BLOCK_D,
    )  # fmt: skip
    take_places(
        k, v, cos, sin, keys, values, key_scales, value_scales, places, scores, score, own, own_place, own_score, wins,
        target, shared, position, window, live, D, HALF, SINKS, SPAN, BLOCK_D,
    )  # fmt: skip
    return loser_place, is_evicted


@triton.jit
def answer_anchored_heads(
    q, low, out, cos, sin, cos_sink, sin_sink, far_up, mix_bias, mix_weight, basis, nodes, log_weights, scale, tile, z,
    keys, values, key_scales, value_scales, position, window, limit, live, v0, q_head,
    R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr, SINKS: tl.constexpr,
    RANK: tl.constexpr, EXP: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """As `decode.answer_heads`, over what the places hold."""
    HALF_LINEAR: tl.constexpr = HALF if ROTATED else 0
    col = v0 + tl.arange(0, BLOCK_V)
    left = tl.minimum(tl.maximum(position + 1 - SINKS - window, 0), limit)
    used = (SINKS + window + left) * live
    for r in range(R):
        q_here = q + r * q_head
        phi = features(
            q_here, cos, sin, far_up + r * D * RANK, low, q, q, basis, nodes, log_weights, scale, D,
            D, K, HALF_LINEAR, False, RANK, BLOCK_RANK, EXP, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        sums, total, mixed = places_part(
            q_here, keys, values, key_scales, value_scales, cos, sin, cos_sink, sin_sink, mix_weight + r * D, position,
            window, used, left, v0, D, HALF, ROTATED, SINKS, BLOCK_D, BLOCK_V, BLOCK_J,
        )  # fmt: skip
        total = tl.where(live > 0, total, 1.0)
        answer = joined(phi, tile, z, sums, total, mixed, mix_bias + r, K, 1, True)
        tl.store(out + r * D + col, answer.to(out.dtype.element_ty), mask=col < D)


@triton.jit(do_not_specialize_on_alignment=INDICES)
def anchored_decode_kernel(
    q, k, v, low, token_scores, out, entering, slots, positions, cos, sin, cos_sink, sin_sink, frequencies, first_place,
    windows, limits, ages, basis, nodes, log_weights, log_decay, far_up, mix_bias, mix_weight, state, normaliser,
    near_keys, near_values, near_key_scales, near_value_scales, near_positions, near_scores, recent_scores, q_row,
    q_head, k_row, k_head, v_row, v_head, state_slot, normaliser_slot, near_slot, scales_slot, recent_slot, scale,
    R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr, SINKS: tl.constexpr,
    SPAN: tl.constexpr, RANK: tl.constexpr, EXP: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid (N, G). Rows of slot 0 are padding: they touch no state, and what they answer is never read.

    As `decode_kernel`; token_scores [N, G]; entering [N, G, 2, D] fp32, scratch: key and value of whoever is evicted;
    frequencies [HALF] fp64; first_place, windows and limits [G] int64; ages [1] fp64; near_slot and scales_slot are the
    distances between slots of rows of places [B, D] and of their numbers [B], recent_slot that of [G, 2 SPAN + 1].
    """
    n, g, num_groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    slot, position = tl.load(slots + n), tl.load(positions + n)
    live = tl.where(slot > 0, 1, 0)
    f = tl.arange(0, BLOCK_K)
    first, window, limit = tl.load(first_place + g), tl.load(windows + g), tl.load(limits + g)
    keys, values = near_keys + slot * near_slot + first * D, near_values + slot * near_slot + first * D
    numbers = slot * scales_slot + first
    key_scales, value_scales = near_key_scales + numbers, near_value_scales + numbers
    own_entering = entering + (n * num_groups + g) * 2 * D
    cos_here, sin_here = cos + n * HALF, sin + n * HALF
    loser_place, is_evicted = make_room(
        k + n * k_row + g * k_head, v + n * v_row + g * v_head, cos_here, sin_here, own_entering,
        recent_scores + slot * recent_slot + g * (2 * SPAN + 1), keys, values, key_scales, value_scales,
        near_positions + numbers, near_scores + numbers, tl.load(token_scores + n * num_groups + g), frequencies, ages,
        position, window, limit, live, D, HALF, ROTATED, SINKS, SPAN, BLOCK_D, BLOCK_J, BLOCK_R,
    )  # fmt: skip
    log_step, in_state = tl.load(log_decay + g), f < K * live
    entering_width, distance = D * is_evicted, tl.where(is_evicted > 0, position - loser_place, 0)
    phi_in = features(
        own_entering, cos, sin, k, k, k, k, basis, nodes + g * K, log_weights + g * K, scale, entering_width,
        D, K, 0, False, 0, 1, EXP, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    phi_in *= tl.exp(log_step * distance.to(tl.float32)) * is_evicted
    z_here = normaliser + slot * normaliser_slot + g * K + f
    z = phi_in + tl.exp(log_step) * tl.load(z_here, mask=in_state, other=0.0)
    tile_rows = state + slot * state_slot + (g * K + f) * D
    for v0 in range(0, D, BLOCK_V):  # one turn, unless the tile is too large for the registers
        col = v0 + tl.arange(0, BLOCK_V)
        v_in = tl.load(own_entering + D + col, mask=col < entering_width, other=0.0)
        tile = load_tile(tile_rows, in_state, v0, D, BLOCK_V) * tl.exp(log_step) + phi_in[:, None] * v_in[None, :]
        answer_anchored_heads(
            q + n * q_row + g * R * q_head, low + n * RANK, out + (n * num_groups + g) * R * D, cos_here, sin_here,
            cos_sink + n * HALF, sin_sink + n * HALF, far_up + g * R * D * RANK, mix_bias + g * R,
            mix_weight + g * R * D, basis, nodes + g * K, log_weights + g * K, scale, tile, z, keys, values,
            key_scales, value_scales, position, window, limit, live, v0, q_head,
            R, D, K, HALF, ROTATED, SINKS, RANK, EXP, BLOCK_RANK, BLOCK_C, BLOCK_D, BLOCK_K, BLOCK_V, BLOCK_J,
        )  # fmt: skip
        tl.debug_barrier()
        store_tile(tile, state, tile_rows, in_state, position, v0, D, BLOCK_K, BLOCK_V)
    tl.debug_barrier()
    tl.store(z_here, z, mask=in_state)
