"""Prefill, first part: features of all queries, and of the keys that enter the state at each token.

Programs work on chunks: C tokens of one segment, packed rows `row` on, `count` of them there.
"""

import triton
import triton.language as tl

from dijiang_model.ops.triton.kernels.parts import (
    INDICES,
    positive,
    rounded_as,
    row_factors,
    scale_at,
    turned,
    turned_back,
)


@triton.jit
def chunk_at(m, chunk_sequence, chunk_offset, starts, C: tl.constexpr):
    """Of chunk m: its sequence, its offset in the segment, its first packed row, its tokens."""
    n = tl.load(chunk_sequence + m)
    offset = tl.load(chunk_offset + m)
    start = tl.load(starts + n)
    count = tl.minimum(tl.load(starts + n + 1) - start - offset, C)
    return n, offset, start + offset, count


@triton.jit
def block_features(
    x, rows, count, row_scales, cos, sin, late_cos, late_sin, basis, nodes, log_weights, scale,
    D: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr, EXP: tl.constexpr, C: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """phi of C vectors at the pointers x [C, 1], whose angles lie in `rows` [C, 1]: [C, BLOCK_K] fp32.

    `row_scales` [C, 1] or a number: what the vectors are multiplied with.
    """
    f = tl.arange(0, BLOCK_K)
    in_k = f < K
    has_row = tl.arange(0, C)[:, None] < count
    sums = tl.zeros([C, BLOCK_K], tl.float32)
    for start in range(0, D, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        mask = has_row & (c < D)
        if BACK:
            value = turned_back(x, c, mask, cos + rows * HALF, sin + rows * HALF, late_cos, late_sin, HALF)
        else:
            value = turned(x, c, mask, cos + rows * HALF, sin + rows * HALF, x, x, HALF, 0, 1)
        b = start + tl.arange(0, BLOCK_C)[:, None]
        tile = tl.load(basis + b * K + f[None, :], mask=(b < D) & in_k[None, :], other=0.0)
        sums = tl.dot(value, tile, sums, input_precision=PRECISION)
    radii = tl.load(nodes + f, mask=in_k, other=0.0) * scale
    logits = sums * row_scales * radii[None, :] + tl.load(log_weights + f, mask=in_k, other=0.0)[None, :]
    return positive(logits, in_k[None, :], EXP, 1)


@triton.jit
def table_factors(table, positions, rows, count, num_entries, h, num_heads, C: tl.constexpr):
    """[C] entries of a position table for a head, 0 where there is no token."""
    has_row = tl.arange(0, C) < count
    position = tl.load(positions + rows, mask=has_row, other=0)
    return tl.load(table + tl.minimum(position, num_entries - 1) * num_heads + h, mask=has_row, other=0.0)


@triton.jit(do_not_specialize_on_alignment=INDICES)
def queries_kernel(
    q, phi_q, positions, cos, sin, basis, nodes, log_weights, table_read, chunk_sequence, chunk_offset, starts, q_row,
    q_head, num_entries, scale,
    R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, EXP: tl.constexpr, TABLE: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (M, H): phi_q [T, H, K] of q [T, H, D], read factors of position tables folded in."""
    h = tl.program_id(1)
    num_heads = tl.num_programs(1)
    _, _, row, count = chunk_at(tl.program_id(0), chunk_sequence, chunk_offset, starts, C)
    i = tl.arange(0, C)
    rows = row + i
    g = h // R
    phi = block_features(
        q + rows[:, None] * q_row + h * q_head, rows[:, None], count, 1.0, cos, sin, cos, sin,
        basis, nodes + g * K, log_weights + g * K, scale,
        D, K, HALF, False, EXP, C, BLOCK_C, BLOCK_K, PRECISION,
    )  # fmt: skip
    if TABLE:
        phi *= table_factors(table_read, positions, rows, count, num_entries, h, num_heads, C)[:, None]
    f = tl.arange(0, BLOCK_K)[None, :]
    here = phi_q + (rows[:, None] * num_heads + h) * K + f
    tl.store(here, phi.to(phi_q.dtype.element_ty), mask=(i[:, None] < count) & (f < K))


@triton.jit(do_not_specialize_on_alignment=INDICES)
def keys_kernel(
    k, v, rotated, int8_values, key_scales, value_scales, cos, sin, chunk_sequence, chunk_offset, starts, k_row, k_head,
    v_row, v_head,
    D: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (M, G): the rotated keys [T, G, D], in the exact rows' dtype.

    Where that is int8 also the values, `int8_values` [T, G, D], and the scales of both [T, G].
    """
    g = tl.program_id(1)
    num_groups = tl.num_programs(1)
    _, _, row, count = chunk_at(tl.program_id(0), chunk_sequence, chunk_offset, starts, C)
    i = tl.arange(0, C)[:, None]
    rows = row + i
    c = tl.arange(0, BLOCK_D)[None, :]
    mask = (i < count) & (c < D)
    key = turned(k + rows * k_row + g * k_head, c, mask, cos + rows * HALF, sin + rows * HALF, k, k, HALF, 0, 1)
    here = (rows * num_groups + g) * D + c
    if rotated.dtype.element_ty == tl.int8:
        token = rows * num_groups + g
        factor, key_scale = row_factors(key, rotated, 1)
        key = rounded_as(key, rotated, factor[:, None])
        value = tl.load(v + rows * v_row + g * v_head + c, mask=mask, other=0.0).to(tl.float32)
        factor, value_scale = row_factors(value, int8_values, 1)
        tl.store(
            int8_values + here,
            rounded_as(value, int8_values, factor[:, None]).to(int8_values.dtype.element_ty),
            mask=mask,
        )
        tl.store(key_scales + token, key_scale[:, None], mask=i < count)
        tl.store(value_scales + token, value_scale[:, None], mask=i < count)
    tl.store(rotated + here, key.to(rotated.dtype.element_ty), mask=mask)


@triton.jit
def leaving_rows(
    rotated, v, key_scales, value_scales, near_keys, near_values, near_key_scales, near_value_scales, rows, source,
    leaves, slot, position, v_row, v_head, near_slot, scales_slot, g, num_groups,
    D: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Pointers [C] to the keys, the values and the scales of both that leave the window when `rows` come.

    `source` [C]: their places in the segment; below 0 they are in the ring.
    """
    is_here = source >= 0
    ring_row = g * (SINKS + WINDOW) + SINKS + position % WINDOW
    ring, ring_scale = slot * near_slot + ring_row * D, slot * scales_slot + ring_row
    own_scale = (rows - WINDOW) * num_groups + g
    key = tl.where(is_here, rotated + own_scale * D, near_keys + ring)
    value = tl.where(is_here, v + (rows - WINDOW) * v_row + g * v_head, near_values + ring)
    # Rows that nothing leaves for are read as the ring's row 0, which is there, and come to nothing afterwards.
    key = tl.where(leaves, key, near_keys + slot * near_slot)
    key_scale = tl.where(is_here, key_scales + own_scale, near_key_scales + ring_scale)
    value_scale = tl.where(is_here, value_scales + own_scale, near_value_scales + ring_scale)
    return key, value, key_scale, value_scale


@triton.jit(do_not_specialize_on_alignment=INDICES)
def entering_kernel(
    k, rotated, v, key_scales, value_scales, phi_in, v_in, slots, positions, cos, sin, late_cos, late_sin, basis, nodes,
    log_weights, log_decay, table_write, near_keys, near_values, near_key_scales, near_value_scales, chunk_sequence,
    chunk_offset, starts, k_row, k_head, v_row, v_head, near_slot, scales_slot, num_entries, scale,
    D: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, EXP: tl.constexpr, TABLE: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (M, G): what enters the state at each token, phi_in [T, G, K] and, with a window, v_in [T, G, D].

    Without a window that is the token itself. With one it is the token that leaves it: of the same segment, or of
    the ring as the step before left it. Write factors and the decay of the window's steps are folded in, and the
    scales of exact rows in int8: `key_scales` and `value_scales` [T, G] of `rotated` and v, and those of the ring.
    """
    g = tl.program_id(1)
    num_groups = tl.num_programs(1)
    n, offset, row, count = chunk_at(tl.program_id(0), chunk_sequence, chunk_offset, starts, C)
    i = tl.arange(0, C)
    rows = row + i
    group_nodes = nodes + g * K
    group_weights = log_weights + g * K
    if WINDOW > 0:
        source = offset + i - WINDOW
        position = tl.load(positions + tl.load(starts + n)) + source
        leaves = (i < count) & (position >= SINKS)
        key, value, key_scale, value_scale = leaving_rows(
            rotated, v, key_scales, value_scales, near_keys, near_values, near_key_scales, near_value_scales, rows,
            source, leaves, tl.load(slots + n), position, v_row, v_head, near_slot, scales_slot, g, num_groups,
            D, WINDOW, SINKS,
        )  # fmt: skip
        HALF_BACK: tl.constexpr = 0 if ROTATED else HALF
        phi = block_features(
            key[:, None], rows[:, None], count, scale_at(key_scale[:, None], leaves[:, None], near_keys),
            cos, sin, late_cos, late_sin,
            basis, group_nodes, group_weights, scale,
            D, K, HALF_BACK, True, EXP, C, BLOCK_C, BLOCK_K, PRECISION,
        )  # fmt: skip
        late = tl.exp(tl.load(log_decay + g) * WINDOW)
        phi = tl.where(leaves[:, None], phi * late, 0.0)
        c = tl.arange(0, BLOCK_D)[None, :]
        values = tl.load(value[:, None] + c, mask=leaves[:, None] & (c < D), other=0.0)
        v_here = v_in + (rows[:, None] * num_groups + g) * D + c
        if near_values.dtype.element_ty == tl.int8:
            scales = scale_at(value_scale[:, None], leaves[:, None], near_values)
            values = (values.to(tl.float32) * scales).to(v_in.dtype.element_ty)
        tl.store(v_here, values, mask=(i[:, None] < count) & (c < D))
    else:
        HALF_LINEAR: tl.constexpr = HALF if ROTATED else 0
        phi = block_features(
            k + rows[:, None] * k_row + g * k_head, rows[:, None], count, 1.0, cos, sin, cos, sin,
            basis, group_nodes, group_weights, scale,
            D, K, HALF_LINEAR, False, EXP, C, BLOCK_C, BLOCK_K, PRECISION,
        )  # fmt: skip
        if TABLE:
            phi *= table_factors(table_write, positions, rows, count, num_entries, g, num_groups, C)[:, None]
    f = tl.arange(0, BLOCK_K)[None, :]
    here = phi_in + (rows[:, None] * num_groups + g) * K + f
    tl.store(here, phi.to(phi_in.dtype.element_ty), mask=(i[:, None] < count) & (f < K))
