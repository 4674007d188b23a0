"""What a segment finds in the places of a layer with anchors, who enters the state, and who stands where afterwards.

The candidates of a head are its J columns as the segment finds them, then the segment's T new tokens. Those of a step's
N segments lie one segment after another, each [G, J + T]. Held ones are read where they are until `places_kernel` runs.
"""

import triton
import triton.language as tl

from dijiang_model.ops.triton.kernels.anchors import turned_back_at
from dijiang_model.ops.triton.kernels.evictions import SIZES
from dijiang_model.ops.triton.kernels.parts import INDICES, codes_at
from dijiang_model.ops.triton.kernels.prefill_features import block_features, chunk_at

VIEWS = (*INDICES, "token_scores", "token_sequence")
"""Arguments that begin wherever the step's segments do."""


@triton.jit
def segment_at(n, positions, starts):
    """Of segment n: its first packed row, its tokens, and the position of the first of them."""
    start = tl.load(starts + n)
    return start, tl.load(starts + n + 1) - start, tl.load(positions + start)


@triton.jit
def shared_in_segment(
    token_scores, recent, token, is_final, start, first, g, num_groups, SPAN: tl.constexpr, BLOCK_J: tl.constexpr
):
    """The largest score of the tokens up to SPAN away from `token` [J], of the segment and before it."""
    SIZE: tl.constexpr = 2 * SPAN + 1
    shared = tl.full([BLOCK_J], float("-inf"), tl.float32)
    for at in tl.static_range(SIZE):
        other = token - SPAN + at
        is_new, is_old = is_final & (other >= first), is_final & (other < first) & (other >= 0)
        new = tl.load(token_scores + (start + other - first) * num_groups + g, mask=is_new, other=float("-inf"))
        old = tl.load(recent + other % SIZE, mask=is_old, other=float("-inf"))
        shared = tl.maximum(shared, tl.maximum(new, old))
    return shared


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=VIEWS)
def candidates_kernel(
    token_scores, near_scores, near_positions, recent_scores, slots, positions, starts, first_place, windows, limits,
    candidate_scores, candidate_places, scales_slot, recent_slot, num_columns,
    SINKS: tl.constexpr, SPAN: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Grid (N, G, blocks of J + T): shared scores fp32 and positions int32 of all candidates.

    The position of one that holds no token is the largest number: no query comes after it. A token's score is shared
    once SPAN tokens came after it; sinks keep their own.
    """
    n, g, num_groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    start, num_tokens, first = segment_at(n, positions, starts)
    slot, window, limit = tl.load(slots + n), tl.load(windows + g), tl.load(limits + g)
    j = tl.program_id(2) * BLOCK_J + tl.arange(0, BLOCK_J)
    anchor = j - SINKS - window
    is_new, exists = j >= num_columns, j < num_columns + num_tokens
    in_ring = (j >= SINKS) & (anchor < 0)
    token = tl.where(is_new, first + j - num_columns, first - 1 - (first - 1 - (j - SINKS) + window) % window)
    token = tl.where(is_new | in_ring, token, -1)
    left = tl.minimum(limit, tl.maximum(first - SINKS - window, 0))
    holds = is_new | ((j < SINKS) & (j < first)) | (token >= SINKS) | ((anchor >= 0) & (anchor < left))
    in_places = (is_new == 0) & (anchor < limit)
    at = slot * scales_slot + tl.load(first_place + g) + j
    fresh = token_scores + (start + j - num_columns) * num_groups + g
    score = tl.load(tl.where(is_new, fresh, near_scores + at), mask=(is_new & exists) | in_places, other=0.0)
    is_final = exists & (token >= SINKS) & (token >= first - SPAN) & (token + SPAN < first + num_tokens)
    recent = recent_scores + slot * recent_slot + g * (2 * SPAN + 1)
    shared = shared_in_segment(token_scores, recent, token, is_final, start, first, g, num_groups, SPAN, BLOCK_J)
    place = tl.load(near_positions + at, mask=in_places, other=0)
    place = tl.where(holds, tl.where(is_new, token.to(tl.int32), place), 0x7FFFFFFF)
    here = num_groups * (n * num_columns + start) + g * (num_columns + num_tokens) + j
    tl.store(candidate_scores + here, tl.where(is_final, shared, score), mask=exists)
    tl.store(candidate_places + here, place, mask=exists)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=VIEWS)
def losers_kernel(
    keys, values, key_scales, value_scales, near_keys, near_values, near_key_scales, near_value_scales,
    candidate_places, losers, token_sequence, slots, positions, starts, first_place, frequencies, log_decay,
    entering_keys, v_in, weights, keys_slot, values_slot, scales_slot, num_columns,
    D: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (T, G): who is evicted as each token comes: its key [T, G, D] fp32, without its rotation where HALF > 0, its
    value v_in [T, G, D], and the decay of its distance, weights [T, G]; zeros where nobody is.

    Args:
        keys, values, key_scales, value_scales: of the segments' own tokens, [T, G, D], [T, G, WIDTH] and [T, G].
        losers: by segment [G, T] int64, candidate or -1.
        frequencies: [HALF] fp64.
    """
    t, g, num_groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    n = tl.load(token_sequence + t)
    start, num_tokens, first = segment_at(n, positions, starts)
    slot = tl.load(slots + n)
    loser = tl.load(losers + num_groups * start + g * num_tokens + t - start)
    is_evicted = loser >= 0
    loser = tl.maximum(loser, 0)
    is_held = loser < num_columns
    place = tl.load(first_place + g) + loser
    row = tl.where(is_held, 0, start + loser - num_columns) * num_groups + g
    here = num_groups * (n * num_columns + start) + g * (num_columns + num_tokens) + loser
    position = tl.load(candidate_places + here, mask=is_evicted, other=0).to(tl.int64)
    c = tl.arange(0, BLOCK_D)
    mask = c < tl.where(is_evicted, D, 0)
    key_at = tl.where(is_held, near_keys + slot * keys_slot + place * D, keys + row * D)
    value_at = tl.where(is_held, near_values + slot * values_slot + place * WIDTH, values + row * WIDTH)
    number = slot * scales_slot + place
    key_scale = tl.load(tl.where(is_held, near_key_scales + number, key_scales + row), mask=is_evicted, other=0.0)
    value_scale = tl.load(tl.where(is_held, near_value_scales + number, value_scales + row), mask=is_evicted, other=0.0)
    key = turned_back_at(key_at, c, mask, position, frequencies, HALF) * key_scale
    value = codes_at(value_at, c, mask).to(tl.float32) * value_scale
    out = (t * num_groups + g) * D + c
    tl.store(entering_keys + out, key, mask=c < D)
    tl.store(v_in + out, value.to(v_in.dtype.element_ty), mask=c < D)
    distance = tl.where(is_evicted, first + t - start - position, 0).to(tl.float32)
    weight = tl.where(is_evicted, tl.exp(tl.load(log_decay + g) * distance), 0.0)
    tl.store(weights + t * num_groups + g, weight)


@triton.jit(do_not_specialize_on_alignment=VIEWS)
def entering_features_kernel(
    entering_keys, weights, phi_in, basis, nodes, log_weights, chunk_sequence, chunk_offset, starts, scale,
    D: tl.constexpr, K: tl.constexpr, EXP: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (M, G): phi_in [T, G, K] of keys [T, G, D] fp32, times weights [T, G]."""
    g, num_groups = tl.program_id(1), tl.num_programs(1)
    _, _, row, count = chunk_at(tl.program_id(0), chunk_sequence, chunk_offset, starts, C)
    i = tl.arange(0, C)
    token = (row + i) * num_groups + g
    phi = block_features(
        entering_keys + token[:, None] * D, token[:, None], count, 1.0, weights, weights, weights, weights,
        basis, nodes + g * K, log_weights + g * K, scale,
        D, K, 0, False, EXP, C, BLOCK_C, BLOCK_K, PRECISION,
    )  # fmt: skip
    weight = tl.load(weights + token, mask=i < count, other=0.0)
    phi = tl.where(weight[:, None] > 0, phi * weight[:, None], 0.0)
    f = tl.arange(0, BLOCK_K)[None, :]
    tl.store(phi_in + token[:, None] * K + f, phi.to(phi_in.dtype.element_ty), mask=(i[:, None] < count) & (f < K))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=VIEWS)
def places_kernel(
    keys, values, key_scales, value_scales, candidate_scores, candidate_places, sources, token_scores, slots, positions,
    starts, first_place, windows, limits, near_keys, near_values, near_key_scales, near_value_scales, near_scores,
    near_positions, recent_scores, keys_slot, values_slot, scales_slot, recent_slot, num_columns,
    D: tl.constexpr, WIDTH: tl.constexpr, SINKS: tl.constexpr, SPAN: tl.constexpr, ANCHORS: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid (N, G, blocks of J): every place gets its token after the segment, and its score.

    The first launch writes ANCHORS, which come from the ring or from the segment; the second what is left, all of it
    from the segment, and the last scores. So no program reads what another one of its launch writes.
    """
    n, g, num_groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    start, num_tokens, first = segment_at(n, positions, starts)
    slot, window, limit = tl.load(slots + n), tl.load(windows + g), tl.load(limits + g)
    j = tl.program_id(2) * BLOCK_J + tl.arange(0, BLOCK_J)
    if ANCHORS:
        is_own = (j >= SINKS + window) & (j < SINKS + window + limit)
    else:
        is_own = j < SINKS + window
    source = tl.load(sources + (n * num_groups + g) * num_columns + j, mask=is_own, other=0)
    moves, is_new = is_own & (source != j), source >= num_columns
    base = tl.load(first_place + g)
    number, to = slot * scales_slot + base + source, slot * scales_slot + base + j
    row = tl.where(is_new, start + source - num_columns, 0) * num_groups + g
    c = tl.arange(0, BLOCK_D)[None, :]
    near = near_keys + slot * keys_slot + base * D
    key_at = tl.where(is_new, keys + row * D, near + source * D)[:, None] + c
    mask = moves[:, None] & (c < D)
    tl.store(near + j[:, None] * D + c, tl.load(key_at, mask=mask, other=0), mask=mask)
    near = near_values + slot * values_slot + base * WIDTH
    value_at = tl.where(is_new, values + row * WIDTH, near + source * WIDTH)[:, None] + c
    mask = moves[:, None] & (c < WIDTH)
    tl.store(near + j[:, None] * WIDTH + c, tl.load(value_at, mask=mask, other=0), mask=mask)
    scale = tl.load(tl.where(is_new, key_scales + row, near_key_scales + number), mask=moves, other=0.0)
    tl.store(near_key_scales + to, scale, mask=moves)
    scale = tl.load(tl.where(is_new, value_scales + row, near_value_scales + number), mask=moves, other=0.0)
    tl.store(near_value_scales + to, scale, mask=moves)
    candidate = num_groups * (n * num_columns + start) + g * (num_columns + num_tokens) + source
    tl.store(near_positions + to, tl.load(candidate_places + candidate, mask=moves, other=0), mask=moves)
    tl.store(near_scores + to, tl.load(candidate_scores + candidate, mask=is_own, other=0.0), mask=is_own)
    if not ANCHORS:
        SIZE: tl.constexpr = 2 * SPAN + 1
        r = tl.arange(0, BLOCK_R)
        is_last = r < tl.where(tl.program_id(2) == 0, tl.minimum(num_tokens, SIZE), 0)
        score = tl.load(token_scores + (start + num_tokens - 1 - r) * num_groups + g, mask=is_last, other=0.0)
        recent = recent_scores + slot * recent_slot + g * SIZE
        tl.store(recent + (first + num_tokens - 1 - r) % SIZE, score, mask=is_last)
