"""One token of each of N sequences: everything between the projections of a layer in one launch.

One program serves one sequence and one key-value head: its state tile is read once, moved on, and read out by all
its query heads while it is in registers.
"""

import triton
import triton.language as tl

from dijiang_model.ops.triton.kernels.parts import features, kept, stored, turned


@triton.jit
def near_part(
    q,
    k_new,
    v,
    keys,
    values,
    cos,
    sin,
    cos_sink,
    sin_sink,
    mix_weight,
    position,
    num_near,
    v0,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ROTATED: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Exact softmax of one query over the first `num_near` near rows and the new token, which is not written yet.

    Returns:
        [BLOCK_V] weighted values, their weights' sum, and w_h . q of the mixing weight.
    """
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
    col = v0 + tl.arange(0, BLOCK_V)
    in_v = col < D
    largest = tl.sum(tl.where(position < SINKS, sink_query, query) * k_new)
    total = largest * 0 + 1.0
    sums = kept(tl.load(v + col, mask=in_v, other=0.0), values)
    ring = position % WINDOW
    for start in range(0, SINKS + WINDOW, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        # A ring row holds the last position of its residue; the new token's own row still holds the one before.
        held = position - (ring - (j - SINKS) + WINDOW) % WINDOW
        in_ring = (j >= SINKS) & (held >= SINKS) & (held < position)
        seen = (j < num_near) & (((j < SINKS) & (j < position)) | in_ring)
        key = tl.load(keys + j[:, None] * D + c[None, :], mask=seen[:, None] & in_d[None, :], other=0.0).to(tl.float32)
        scores = tl.sum(tl.where(j[:, None] < SINKS, sink_query[None, :], query[None, :]) * key, 1)
        scores = tl.where(seen, scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 0))
        weights = tl.exp(scores - now)
        shrink = tl.exp(largest - now)
        value = tl.load(values + j[:, None] * D + col[None, :], mask=seen[:, None] & in_v[None, :], other=0.0)
        sums = sums * shrink + tl.sum(weights[:, None] * value.to(tl.float32), 0)
        total = total * shrink + tl.sum(weights, 0)
        largest = now
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
def joined(
    phi,
    tile,
    z,
    sums,
    total,
    mixed,
    mix_bias,
    K: tl.constexpr,
    WINDOW: tl.constexpr,
    DENOMINATOR: tl.constexpr,
):
    """The read-out of one head: [BLOCK_V], normalised together with the window, or raw sums without a denominator."""
    far = tl.sum(phi[:, None] * tile, 0)
    if not DENOMINATOR:
        return far
    far_total = tl.sum(phi * z, 0)
    if WINDOW == 0:
        return far / far_total
    mix = K * tl.exp(tl.load(mix_bias) + mixed)
    return (sums + mix * far) / (total + mix * far_total)


@triton.jit
def decode_kernel(
    q,
    k,
    v,
    low,
    out,
    slots,
    positions,
    cos,
    sin,
    cos_sink,
    sin_sink,
    late_cos,
    late_sin,
    basis,
    nodes,
    log_weights,
    log_decay,
    table_decay,
    table_write,
    table_read,
    far_up,
    mix_bias,
    mix_weight,
    state,
    normaliser,
    near_keys,
    near_values,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    state_slot,
    normaliser_slot,
    near_slot,
    num_entries,
    scale,
    R: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    ROTATED: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    RANK: tl.constexpr,
    EXP: tl.constexpr,
    TABLE: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Grid (N, G). Rows of slot 0 are padding: they touch no state, and what they answer is never read.

    q [N, H, D], k and v [N, G, D] with any strides of rows and heads; low [N, RANK]; out [N, H, D].
    cos, sin and those of sinks [N, HALF]; late ones [HALF], the angles of WINDOW positions. state [P, G, K, D],
    normaliser [P, G, K], near rows [P, G, SINKS + WINDOW, D], each slot contiguous, `*_slot` elements from one to
    the next.
    """
    n = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    num_groups = tl.num_programs(1)
    slot = tl.load(slots + n)
    position = tl.load(positions + n)
    f = tl.arange(0, BLOCK_K)
    # A block may not be masked by a scalar in every version of Triton; bounds may depend on one.
    is_live = slot > 0
    width = tl.where(is_live, D, 0)
    in_state = f < tl.where(is_live, K, 0)
    num_near = tl.where(is_live, SINKS + WINDOW, 0)
    HALF_FAR: tl.constexpr = HALF if ROTATED else 0
    angles = n * HALF

    write = 1.0
    read = 1.0
    if TABLE:
        entry = tl.minimum(position, num_entries - 1) * num_groups + g
        log_step = tl.load(table_decay + entry)
        write = tl.load(table_write + entry)
        read = tl.load(table_read + entry)
    else:
        log_step = tl.load(log_decay + g)
    decay = tl.exp(log_step)
    # On its way while features are computed: the state is most of what has to be moved.
    tile_rows = state + slot * state_slot + (g * K + f) * D
    tile = load_tile(tile_rows, in_state, 0, D, BLOCK_V)

    # What enters the state: the token itself, or the one that leaves the window, W steps late.
    c = tl.arange(0, BLOCK_D)
    in_d = c < D
    k_here = k + n * k_row + g * k_head
    v_here = v + n * v_row + g * v_head
    keys = near_keys + slot * near_slot + g * (SINKS + WINDOW) * D
    values = near_values + slot * near_slot + g * (SINKS + WINDOW) * D
    table = basis
    group_nodes = nodes + g * K
    group_weights = log_weights + g * K
    if WINDOW > 0:
        k_new = kept(turned(k_here, c, in_d, cos + angles, sin + angles, k, k, HALF, 0, 1), near_keys)
        ring_row = SINKS + position % WINDOW
        leaving_width = tl.where(position - WINDOW >= SINKS, width, 0)
        leaving = keys + ring_row * D
        sink_width = tl.where(position < SINKS, width, 0)
        HALF_BACK: tl.constexpr = 0 if ROTATED else HALF
        phi_in = features(
            leaving, cos + angles, sin + angles, k, k, late_cos, late_sin,
            table, group_nodes, group_weights, scale, leaving_width,
            D, K, HALF_BACK, True, 0, 1, EXP, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        phi_in *= tl.where(leaving_width > 0, tl.exp(log_step * WINDOW), 0.0)
    else:
        phi_in = features(
            k_here, cos + angles, sin + angles, k, k, k, k, table, group_nodes, group_weights, scale, D,
            D, K, HALF_FAR, False, 0, 1, EXP, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        phi_in *= write
    z = phi_in
    z_here = normaliser + slot * normaliser_slot + g * K + f
    if DENOMINATOR:
        z = phi_in + decay * tl.load(z_here, mask=in_state, other=0.0)

    for v0 in range(0, D, BLOCK_V):  # one turn, unless the tile is too large for the registers
        col = v0 + tl.arange(0, BLOCK_V)
        in_v = col < D
        if WINDOW > 0:
            v_in = tl.load(values + ring_row * D + col, mask=col < leaving_width, other=0.0).to(tl.float32)
        else:
            v_in = tl.load(v_here + col, mask=in_v, other=0.0).to(tl.float32)
        tile = tile * decay + phi_in[:, None] * v_in[None, :]
        for r in range(R):
            h = g * R + r
            q_here = q + n * q_row + h * q_head
            phi = features(
                q_here, cos + angles, sin + angles, far_up + h * D * RANK, low + n * RANK, q, q,
                table, group_nodes, group_weights, scale, D,
                D, K, HALF_FAR, False, RANK, BLOCK_RANK, EXP, BLOCK_C, BLOCK_K,
            )  # fmt: skip
            sums, total, mixed = phi, 0.0, 0.0
            if WINDOW > 0:
                sums, total, mixed = near_part(
                    q_here, k_new, v_here, keys, values,
                    cos + angles, sin + angles, cos_sink + angles, sin_sink + angles, mix_weight + h * D,
                    position, num_near, v0, D, HALF, ROTATED, WINDOW, SINKS, BLOCK_D, BLOCK_V, BLOCK_J,
                )  # fmt: skip
            answer = joined(phi * read, tile, z, sums, total, mixed, mix_bias + h, K, WINDOW, DENOMINATOR)
            out_here = out + (n * num_groups * R + h) * D + col
            tl.store(out_here, answer.to(out.dtype.element_ty), mask=in_v)
        tl.debug_barrier()
        tile_here = tile_rows[:, None] + col[None, :]
        in_tile = in_state[:, None] & in_v[None, :]
        kept_tile = stored(tile, state, f[:, None] * D + col[None, :], position)
        tl.store(tile_here, kept_tile, mask=in_tile, eviction_policy="evict_first")
        tile = load_tile(tile_rows, in_state, v0 + BLOCK_V, D, BLOCK_V)  # nothing behind the last turn
        if WINDOW > 0:
            v_new = tl.load(v_here + col, mask=in_v, other=0.0).to(near_values.dtype.element_ty)
            tl.store(values + ring_row * D + col, v_new, mask=col < width)
            if SINKS > 0:
                tl.store(values + position * D + col, v_new, mask=col < sink_width)
    tl.debug_barrier()
    if DENOMINATOR:
        tl.store(z_here, z, mask=in_state)
    if WINDOW > 0:
        k_stored = k_new.to(near_keys.dtype.element_ty)
        tl.store(keys + ring_row * D + c, k_stored, mask=c < width)
        if SINKS > 0:
            tl.store(keys + position * D + c, k_stored, mask=c < sink_width)
