"""One token of each of N sequences: everything between the projections of a layer in one launch.

One program serves one sequence and one key-value head: its state tile is read once, moved on, and read out by all
its query heads while it is in registers.
"""

import triton
import triton.language as tl

from dijiang_model.ops.triton.kernels.parts import INDICES, features, rounded_as, row_factors, scale_at, stored, turned


@triton.jit
def scaled_queries(
    q, cos, sin, cos_sink, sin_sink, mix_weight,
    D: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr, SINKS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_D] query over the square root of D, the same for sinks, and w_h . q of the mixing weight."""
    c = tl.arange(0, BLOCK_D)
    in_d = c < D
    query = turned(q, c, in_d, cos, sin, q, q, HALF, 0, 1)
    mixing = query
    if not ROTATED:
        mixing = tl.load(q + c, mask=in_d, other=0.0).to(tl.float32)
    mixed = tl.sum(mixing * tl.load(mix_weight + c, mask=in_d, other=0.0))
    root = 1.0 / tl.sqrt(D * 1.0)
    query *= root
    sink_query = query
    if SINKS > 0:
        sink_query = turned(q, c, in_d, cos_sink, sin_sink, q, q, HALF, 0, 1) * root
    return query, sink_query, mixed


@triton.jit
def softmax_rows(
    query, sink_query, keys, values, key_scales, value_scales, j, seen, v0, largest, total, sums,
    D: tl.constexpr, SINKS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One step of a softmax over exact rows: the BLOCK_J rows j, as far as they are `seen`.

    Returns:
        The largest score, the sum of weights relative to it, and [BLOCK_V] weighted values.
    """
    c, col = tl.arange(0, BLOCK_D), v0 + tl.arange(0, BLOCK_V)
    key_mask, value_mask = seen[:, None] & (c < D)[None, :], seen[:, None] & (col < D)[None, :]
    key = tl.load(keys + j[:, None] * D + c[None, :], mask=key_mask, other=0.0).to(tl.float32)
    scores = tl.sum(tl.where(j[:, None] < SINKS, sink_query[None, :], query[None, :]) * key, 1)
    scores *= scale_at(key_scales + j, seen, keys)
    scores = tl.where(seen, scores, float("-inf"))
    now = tl.maximum(largest, tl.max(scores, 0))
    weights = tl.exp(scores - now)
    shrink = tl.exp(largest - now)
    value = tl.load(values + j[:, None] * D + col[None, :], mask=value_mask, other=0.0)
    scaled = weights * scale_at(value_scales + j, seen, values)
    sums = sums * shrink + tl.sum(scaled[:, None] * value.to(tl.float32), 0)
    return now, total * shrink + tl.sum(weights, 0), sums


@triton.jit
def exact_part(
    q, k_new, v, v_factor, v_scale, keys, values, key_scales, value_scales, cos, sin, cos_sink, sin_sink, mix_weight,
    position, num_exact, v0,
    D: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Exact softmax of one query over the first `num_exact` exact rows and the new token, which is not written yet.

    `v_factor` and `v_scale` are the `row_factors` of the new value.

    Returns:
        [BLOCK_V] weighted values, their weights' sum, and w_h . q of the mixing weight.
    """
    query, sink_query, mixed = scaled_queries(
        q, cos, sin, cos_sink, sin_sink, mix_weight, D, HALF, ROTATED, SINKS, BLOCK_D
    )
    col = v0 + tl.arange(0, BLOCK_V)
    largest = tl.sum(tl.where(position < SINKS, sink_query, query) * k_new)
    total = largest * 0 + 1.0
    sums = rounded_as(tl.load(v + col, mask=col < D, other=0.0).to(tl.float32), values, v_factor) * v_scale
    ring = position % WINDOW
    for start in range(0, SINKS + WINDOW, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        # A ring row holds the last position of its residue; the new token's own row still holds the one before.
        held = position - (ring - (j - SINKS) + WINDOW) % WINDOW
        in_ring = (j >= SINKS) & (held >= SINKS) & (held < position)
        seen = (j < num_exact) & (((j < SINKS) & (j < position)) | in_ring)
        largest, total, sums = softmax_rows(
            query, sink_query, keys, values, key_scales, value_scales, j, seen, v0, largest, total, sums,
            D, SINKS, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    return sums, total, mixed


@triton.jit
def load_tile(here, in_state, v0, D: tl.constexpr, BLOCK_V: tl.constexpr):
    """[BLOCK_K, BLOCK_V] fp32, columns from v0 on of the state at the pointers `here` [BLOCK_K]; 0 outside of it."""
    col = v0 + tl.arange(0, BLOCK_V)
    mask = in_state[:, None] & (col[None, :] < D)
    # Streams through: nothing in it is read twice.
    tile = tl.load(here[:, None] + col[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    return tile.to(tl.float32)


@triton.jit
def store_tile(
    tile, state, here, in_state, position, v0, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Writes a tile where `load_tile` read it, in the dtype of `state`."""
    f, col = tl.arange(0, BLOCK_K), v0 + tl.arange(0, BLOCK_V)
    mask = in_state[:, None] & (col < D)[None, :]
    kept = stored(tile, state, f[:, None] * D + col[None, :], position)
    tl.store(here[:, None] + col[None, :], kept, mask=mask, eviction_policy="evict_first")


@triton.jit
def new_row(
    k, v, cos, sin, near_keys, near_values, D: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The new token's key as it is kept [BLOCK_D] fp32, and its scale; the `row_factors` of its value."""
    c = tl.arange(0, BLOCK_D)
    key = turned(k, c, c < D, cos, sin, k, k, HALF, 0, 1)
    k_factor, k_scale = row_factors(key, near_keys, 0)
    v_factor, v_scale = row_factors(tl.load(v + c, mask=c < D, other=0.0).to(tl.float32), near_values, 0)
    return rounded_as(key, near_keys, k_factor), k_scale, v_factor, v_scale


@triton.jit
def joined(
    phi, tile, z, sums, total, mixed, mix_bias,
    K: tl.constexpr, WINDOW: tl.constexpr, DENOMINATOR: tl.constexpr,
):  # fmt: skip
    """The read-out of one head: [BLOCK_V], normalised together with the window, or raw sums without a denominator."""
    linear = tl.sum(phi[:, None] * tile, 0)
    if not DENOMINATOR:
        return linear
    linear_total = tl.sum(phi * z, 0)
    if WINDOW == 0:
        return linear / linear_total
    mix = K * tl.exp(tl.load(mix_bias) + mixed)
    return (sums + mix * linear) / (total + mix * linear_total)


@triton.jit
def factors(table_decay, table_write, table_read, log_decay, position, num_entries, g, num_groups, TABLE: tl.constexpr):
    """Log decay of one step, write factor and read factor of a group at a position."""
    if TABLE:
        entry = tl.minimum(position, num_entries - 1) * num_groups + g
        return tl.load(table_decay + entry), tl.load(table_write + entry), tl.load(table_read + entry)
    return tl.load(log_decay + g), 1.0, 1.0


@triton.jit
def entering(
    k, leaving, leaving_scale, cos, sin, late_cos, late_sin, basis, nodes, log_weights, scale, leaving_width, log_step,
    write,
    D: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr, WINDOW: tl.constexpr,
    EXP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K] features of what enters the state: of the token itself, or of the one that leaves the window.

    `leaving` points to the ring's row of that key, `leaving_scale` is what its numbers are multiplied with,
    `leaving_width` is D, or 0 where none leaves.
    """
    if WINDOW == 0:
        HALF_LINEAR: tl.constexpr = HALF if ROTATED else 0
        phi = features(
            k, cos, sin, k, k, k, k, basis, nodes, log_weights, scale, D,
            D, K, HALF_LINEAR, False, 0, 1, EXP, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        return phi * write
    HALF_BACK: tl.constexpr = 0 if ROTATED else HALF
    phi = features(
        leaving, cos, sin, k, k, late_cos, late_sin, basis, nodes, log_weights, scale * leaving_scale, leaving_width,
        D, K, HALF_BACK, True, 0, 1, EXP, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    return phi * tl.where(leaving_width > 0, tl.exp(log_step * WINDOW), 0.0)


@triton.jit
def answer_heads(
    q, low, out, cos, sin, cos_sink, sin_sink, far_up, mix_bias, mix_weight, basis, nodes, log_weights, scale,
    tile, z, read, k_new, v, v_factor, v_scale, keys, values, key_scales, value_scales, position, num_exact, v0, q_head,
    R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, RANK: tl.constexpr, EXP: tl.constexpr, DENOMINATOR: tl.constexpr,
    BLOCK_RANK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Columns v0 on of what a group's R heads answer, each read out of the same tile.

    q, out, far_up, mix_bias and mix_weight point to the group's first head.
    """
    HALF_LINEAR: tl.constexpr = HALF if ROTATED else 0
    col = v0 + tl.arange(0, BLOCK_V)
    for r in range(R):
        q_here = q + r * q_head
        phi = features(
            q_here, cos, sin, far_up + r * D * RANK, low, q, q, basis, nodes, log_weights, scale, D,
            D, K, HALF_LINEAR, False, RANK, BLOCK_RANK, EXP, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        sums, total, mixed = phi, 0.0, 0.0
        if WINDOW > 0:
            sums, total, mixed = exact_part(
                q_here, k_new, v, v_factor, v_scale, keys, values, key_scales, value_scales, cos, sin, cos_sink,
                sin_sink, mix_weight + r * D, position, num_exact, v0,
                D, HALF, ROTATED, WINDOW, SINKS, BLOCK_D, BLOCK_V, BLOCK_J,
            )  # fmt: skip
        answer = joined(phi * read, tile, z, sums, total, mixed, mix_bias + r, K, WINDOW, DENOMINATOR)
        tl.store(out + r * D + col, answer.to(out.dtype.element_ty), mask=col < D)


@triton.jit
def remember(rows, row, new, at, width, sink_width, position, D: tl.constexpr, SINKS: tl.constexpr):
    """Writes a new key or value into its row of the ring, and into a sink's row while the position is one's.

    `at` are the columns of `new`; those from `width`, or `sink_width`, on stay as they are.
    """
    narrow = new.to(rows.dtype.element_ty)
    tl.store(rows + row * D + at, narrow, mask=at < width)
    if SINKS > 0:
        tl.store(rows + position * D + at, narrow, mask=at < sink_width)


@triton.jit
def remember_scale(scales, row, scale, exact, width, sink_width, position, SINKS: tl.constexpr):
    """The same for the scale of a row in int8."""
    if exact.dtype.element_ty == tl.int8:
        tl.store(scales + row, scale, mask=width > 0)
        if SINKS > 0:
            tl.store(scales + position, scale, mask=sink_width > 0)


@triton.jit
def move_and_answer(
    q, k, v, low, out, cos, sin, cos_sink, sin_sink, far_up, mix_bias, mix_weight, basis, nodes, log_weights, scale,
    tile, phi_in, decay, read, state, tile_rows, in_state, z_here, keys, values, key_scales, value_scales, ring_row,
    position, width, leaving_width, q_head,
    R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, RANK: tl.constexpr, EXP: tl.constexpr, DENOMINATOR: tl.constexpr,
    BLOCK_RANK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Moves one group's state on by phi_in [BLOCK_K] and the value that enters with it, and answers its heads.

    Pointers are the group's own. `tile` has the first BLOCK_V columns of the state; `width` is D, or 0 for padding.
    """
    c = tl.arange(0, BLOCK_D)
    sink_width = tl.where(position < SINKS, width, 0)
    num_exact = tl.where(width > 0, SINKS + WINDOW, 0)
    # Without a window nobody asks for these.
    k_kept, k_scale, v_factor, v_scale, v_in_scale = phi_in, 1.0, 1.0, 1.0, 1.0
    if WINDOW > 0:
        k_kept, k_scale, v_factor, v_scale = new_row(k, v, cos, sin, keys, values, D, HALF, BLOCK_D)
        v_in_scale = scale_at(value_scales + ring_row, leaving_width > 0, values)
    z = phi_in
    if DENOMINATOR:
        z = phi_in + decay * tl.load(z_here, mask=in_state, other=0.0)
    for v0 in range(0, D, BLOCK_V):  # one turn, unless the tile is too large for the registers
        col = v0 + tl.arange(0, BLOCK_V)
        if WINDOW > 0:
            v_in = tl.load(values + ring_row * D + col, mask=col < leaving_width, other=0.0).to(tl.float32) * v_in_scale
        else:
            v_in = tl.load(v + col, mask=col < D, other=0.0).to(tl.float32)
        tile = tile * decay + phi_in[:, None] * v_in[None, :]
        answer_heads(
            q, low, out, cos, sin, cos_sink, sin_sink, far_up, mix_bias, mix_weight, basis, nodes, log_weights, scale,
            tile, z, read, k_kept * k_scale, v, v_factor, v_scale, keys, values, key_scales, value_scales, position,
            num_exact, v0, q_head,
            R, D, K, HALF, ROTATED, WINDOW, SINKS, RANK, EXP, DENOMINATOR, BLOCK_RANK, BLOCK_C, BLOCK_D, BLOCK_K,
            BLOCK_V, BLOCK_J,
        )  # fmt: skip
        tl.debug_barrier()
        store_tile(tile, state, tile_rows, in_state, position, v0, D, BLOCK_K, BLOCK_V)
        tile = load_tile(tile_rows, in_state, v0 + BLOCK_V, D, BLOCK_V)  # nothing behind the last turn
        if WINDOW > 0:
            v_kept = rounded_as(tl.load(v + col, mask=col < D, other=0.0).to(tl.float32), values, v_factor)
            remember(values, ring_row, v_kept, col, width, sink_width, position, D, SINKS)
    tl.debug_barrier()
    if DENOMINATOR:
        tl.store(z_here, z, mask=in_state)
    if WINDOW > 0:
        remember(keys, ring_row, k_kept, c, width, sink_width, position, D, SINKS)
        remember_scale(key_scales, ring_row, k_scale, keys, width, sink_width, position, SINKS)
        remember_scale(value_scales, ring_row, v_scale, values, width, sink_width, position, SINKS)


@triton.jit(do_not_specialize_on_alignment=INDICES)
def decode_kernel(
    q, k, v, low, out, slots, positions, cos, sin, cos_sink, sin_sink, late_cos, late_sin, basis, nodes, log_weights,
    log_decay, table_decay, table_write, table_read, far_up, mix_bias, mix_weight, state, normaliser, near_keys,
    near_values, near_key_scales, near_value_scales, q_row, q_head, k_row, k_head, v_row, v_head, state_slot,
    normaliser_slot, near_slot, scales_slot, num_entries, scale,
    R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, RANK: tl.constexpr, EXP: tl.constexpr, TABLE: tl.constexpr, DENOMINATOR: tl.constexpr,
    BLOCK_RANK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Grid (N, G). Rows of slot 0 are padding: they touch no state, and what they answer is never read.

    q [N, H, D], k and v [N, G, D] with any strides of rows and heads; low [N, RANK]; out [N, H, D].
    cos, sin and those of sinks [N, HALF]; late ones [HALF], the angles of WINDOW positions. state [P, G, K, D],
    normaliser [P, G, K], exact rows [P, G, SINKS + WINDOW, D] and, where they are int8, scales [P, G, SINKS + WINDOW],
    each slot contiguous, `*_slot` elements from one to the next.
    """
    n, g, num_groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    slot, position = tl.load(slots + n), tl.load(positions + n)
    f = tl.arange(0, BLOCK_K)
    # A block may not be masked by a scalar in every version of Triton; bounds may depend on one.
    width = tl.where(slot > 0, D, 0)
    in_state = f < tl.where(slot > 0, K, 0)
    leaving_width = tl.where(position - WINDOW >= SINKS, width, 0)
    log_step, write, read = factors(
        table_decay, table_write, table_read, log_decay, position, num_entries, g, num_groups, TABLE
    )
    # On its way while features are computed: the state is most of what has to be moved.
    tile_rows = state + slot * state_slot + (g * K + f) * D
    tile = load_tile(tile_rows, in_state, 0, D, BLOCK_V)

    k_here, v_here = k + n * k_row + g * k_head, v + n * v_row + g * v_head
    cos_here, sin_here = cos + n * HALF, sin + n * HALF
    exact = slot * near_slot + g * (SINKS + WINDOW) * D
    keys, values = near_keys + exact, near_values + exact
    near_scale = slot * scales_slot + g * (SINKS + WINDOW)
    key_scales, value_scales = near_key_scales + near_scale, near_value_scales + near_scale
    ring_row = SINKS + position % WINDOW if WINDOW > 0 else 0
    leaving_scale = scale_at(key_scales + ring_row, leaving_width > 0, keys)
    phi_in = entering(
        k_here, keys + ring_row * D, leaving_scale, cos_here, sin_here, late_cos, late_sin, basis, nodes + g * K,
        log_weights + g * K, scale, leaving_width, log_step, write, D, K, HALF, ROTATED, WINDOW, EXP, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    move_and_answer(
        q + n * q_row + g * R * q_head, k_here, v_here, low + n * RANK, out + (n * num_groups + g) * R * D, cos_here,
        sin_here, cos_sink + n * HALF, sin_sink + n * HALF, far_up + g * R * D * RANK, mix_bias + g * R,
        mix_weight + g * R * D, basis, nodes + g * K, log_weights + g * K, scale, tile, phi_in, tl.exp(log_step), read,
        state, tile_rows, in_state, normaliser + slot * normaliser_slot + g * K + f, keys, values, key_scales,
        value_scales, ring_row, position, width, leaving_width, q_head,
        R, D, K, HALF, ROTATED, WINDOW, SINKS, RANK, EXP, DENOMINATOR, BLOCK_RANK, BLOCK_C, BLOCK_D, BLOCK_K, BLOCK_V,
        BLOCK_J,
    )  # fmt: skip
