"""Prefill, second part: the state before each chunk and after the last, chunk by chunk; and the exact rows."""

import triton
import triton.language as tl

from dijiang_model.ops.triton.kernels.parts import INDICES, operand, rounded, stored


@triton.jit
def chunk_totals(
    log_decay, table_decay, positions, rows, count, num_entries, g, num_groups, TABLE: tl.constexpr, C: tl.constexpr
):
    """[C] sums of log decays from the chunk's beginning, each token included, and their last; all <= 0."""
    i = tl.arange(0, C)
    if TABLE:
        has_row = i < count
        position = tl.load(positions + rows, mask=has_row, other=0)
        entry = tl.minimum(position, num_entries - 1) * num_groups + g
        steps = tl.load(table_decay + entry, mask=has_row, other=0.0)
        return tl.cumsum(steps, 0), tl.sum(steps, 0)
    step = tl.load(log_decay + g)
    return (i + 1) * step, count * step


@triton.jit(do_not_specialize_on_alignment=INDICES)
def states_kernel(
    phi_in, v_in, chunk_states, chunk_normalisers, state, normaliser, slots, positions, log_decay, table_decay, starts,
    first_chunks, v_row, v_head, state_slot, normaliser_slot, num_entries,
    D: tl.constexpr, K: tl.constexpr, TABLE: tl.constexpr, DENOMINATOR: tl.constexpr, C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILES_V: tl.constexpr, PRECISION: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """Grid (N, G, tiles of the state): chunk_states [M, G, K, D] and, from the first tile of columns,
    chunk_normalisers [M, G, K]; then the slots' state and normaliser, in place.
    """
    n = tl.program_id(0)
    g = tl.program_id(1)
    num_groups = tl.num_programs(1)
    tile_v = tl.program_id(2) % TILES_V
    f = (tl.program_id(2) // TILES_V) * BLOCK_K + tl.arange(0, BLOCK_K)
    col = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    in_tile = (f[:, None] < K) & (col[None, :] < D)
    # Only one column of tiles moves the normaliser on; the others' f lies behind its end.
    own_f = f + tl.where(tile_v == 0, 0, K)
    slot = tl.load(slots + n)
    tile_here = state + slot * state_slot + (g * K + f[:, None]) * D + col[None, :]
    tile = tl.load(tile_here, mask=in_tile, other=0.0).to(tl.float32)
    z_here = normaliser + slot * normaliser_slot + g * K + f
    z = tl.zeros([BLOCK_K], tl.float32)
    if DENOMINATOR:
        z = tl.load(z_here, mask=own_f < K, other=0.0)
    start = tl.load(starts + n)
    length = tl.load(starts + n + 1) - start
    first = tl.load(first_chunks + n)
    i = tl.arange(0, C)
    for index in range(tl.load(first_chunks + n + 1) - first):
        m = first + index
        tl.store(
            chunk_states + ((m * num_groups + g) * K + f[:, None]) * D + col[None, :],
            tile.to(chunk_states.dtype.element_ty),
            mask=in_tile,
        )
        if DENOMINATOR:
            tl.store(chunk_normalisers + (m * num_groups + g) * K + f, z, mask=own_f < K)
        rows = start + index * C + i
        count = tl.minimum(length - index * C, C)
        has_row = i[:, None] < count
        total, last = chunk_totals(log_decay, table_decay, positions, rows, count, num_entries, g, num_groups, TABLE, C)
        phi_here = phi_in + (rows[:, None] * num_groups + g) * K + f[None, :]
        phi = tl.load(phi_here, mask=has_row & (f[None, :] < K), other=0.0).to(tl.float32)
        phi = rounded(phi * tl.exp(tl.minimum(last - total, 0.0))[:, None], phi_in, EMULATED)
        value_here = v_in + rows[:, None] * v_row + g * v_head + col[None, :]
        values = operand(tl.load(value_here, mask=has_row & (col[None, :] < D), other=0.0), phi_in, EMULATED)
        kept = tl.exp(last)
        tile = tl.dot(tl.trans(phi), values, tile * kept, input_precision=PRECISION)
        z = z * kept + tl.sum(phi.to(tl.float32), 0)
    tl.debug_barrier()
    last_position = tl.load(positions + start + length - 1)
    tl.store(tile_here, stored(tile, state, f[:, None] * D + col[None, :], last_position), mask=in_tile)
    if DENOMINATOR:
        tl.store(z_here, z, mask=own_f < K)


@triton.jit
def copy_rows(
    rotated, v, key_scales, value_scales, near_keys, near_values, near_key_scales, near_value_scales, token, v_from, to,
    to_scale, c, is_row, D: tl.constexpr,
):  # fmt: skip
    """Keys and values of tokens [J, 1] to the exact rows at the offsets `to` [J, 1], with their scales if in int8."""
    mask = is_row & (c < D)
    tl.store(near_keys + to + c, tl.load(rotated + token * D + c, mask=mask), mask=mask)
    tl.store(near_values + to + c, tl.load(v + v_from + c, mask=mask), mask=mask)
    if near_keys.dtype.element_ty == tl.int8:
        tl.store(near_key_scales + to_scale, tl.load(key_scales + token, mask=is_row), mask=is_row)
        tl.store(near_value_scales + to_scale, tl.load(value_scales + token, mask=is_row), mask=is_row)


@triton.jit(do_not_specialize_on_alignment=INDICES)
def exact_rows_kernel(
    rotated, v, key_scales, value_scales, near_keys, near_values, near_key_scales, near_value_scales, slots, positions,
    starts, v_row, v_head, near_slot, scales_slot,
    D: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (N, G): writes each segment's last WINDOW tokens into the ring, and its sinks. Runs after all who read."""
    n = tl.program_id(0)
    g = tl.program_id(1)
    num_groups = tl.num_programs(1)
    start = tl.load(starts + n)
    length = tl.load(starts + n + 1) - start
    position = tl.load(positions + start)
    slot, exact_row = tl.load(slots + n), g * (SINKS + WINDOW)
    c = tl.arange(0, BLOCK_D)[None, :]
    j = tl.arange(0, BLOCK_J)[:, None]
    oldest = tl.maximum(length - WINDOW, 0)
    for begin in range(0, WINDOW, BLOCK_J):
        offset = oldest + begin + j
        is_row = (begin + j < WINDOW) & (offset < length)
        rows = start + offset
        to_row = exact_row + SINKS + (position + offset) % WINDOW
        copy_rows(
            rotated, v, key_scales, value_scales, near_keys, near_values, near_key_scales, near_value_scales,
            rows * num_groups + g, rows * v_row + g * v_head, slot * near_slot + to_row * D,
            slot * scales_slot + to_row, c, is_row, D,
        )  # fmt: skip
    for begin in range(0, SINKS, BLOCK_J):
        offset = begin + j
        is_row = (offset < length) & (position + offset < SINKS)
        rows = start + offset
        to_row = exact_row + position + offset
        copy_rows(
            rotated, v, key_scales, value_scales, near_keys, near_values, near_key_scales, near_value_scales,
            rows * num_groups + g, rows * v_row + g * v_head, slot * near_slot + to_row * D,
            slot * scales_slot + to_row, c, is_row, D,
        )  # fmt: skip
