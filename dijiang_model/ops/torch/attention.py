"""The attention of one layer in plain torch operations, on any device: see `ops.AttentionOp`."""

import torch
from torch import Tensor

from dijiang_model.kernel import LinearKernel
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import PrefillLayout, StepLayout
from dijiang_model.ops.torch.anchors import anchored_attention
from dijiang_model.ops.torch.branches import Queries, branch_queries, read_out, store_linear
from dijiang_model.ops.torch.linear import chunked, recurrent_step
from dijiang_model.ops.torch.rounding import ExactRows
from dijiang_model.ops.torch.window import decode_window, prefill_window


class TorchAttention:
    """Decode rows by the recurrence, prefill segments in chunks; the state and all sums in the kernel's dtype."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
    ) -> Tensor:
        if kernel.attention.anchors is not None:
            return anchored_attention(q, k, v, kernel=kernel, layout=layout, state=state)
        dtype = kernel.log_decay.dtype
        q, k = q.to(dtype), k.to(dtype)
        queries = branch_queries(q, kernel=kernel, layout=layout)
        if kernel.attention.window > 0 or kernel.attention.features.rotated:
            k = layout.rotary.apply(k)
        exact = exact_rows(state)
        if exact is not None:  # use what a later step is going to find
            k, v = exact[0].rounded(k), exact[1].rounded(v)
        k, v = k.to(dtype), v.to(dtype)
        split = layout.num_decode
        parts: list[Tensor] = []
        if split > 0:
            rows = queries.rows(0, split)
            parts.append(_decode(rows, k[:split], v[:split], kernel=kernel, layout=layout, state=state))
        if layout.prefill is not None:
            rows = queries.rows(split, None)
            parts.append(_prefill(rows, k[split:], v[split:], kernel=kernel, step=layout, state=state))
        return torch.cat(parts).flatten(1, 2)


def exact_rows(state: LayerState) -> tuple[ExactRows, ExactRows] | None:
    """Keys and values of the window; None without one."""
    if state.near_keys is None or state.near_values is None:
        return None
    return ExactRows(state.near_keys, state.near_key_scales), ExactRows(state.near_values, state.near_value_scales)


def _write_factor(kernel: LinearKernel, positions: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log decay [G] or [T, G], and the write and read factors [T, H] of position tables."""
    if kernel.attention.decay == "static":
        return kernel.log_decay, None, None
    entry = positions.clamp(max=kernel.table_write.shape[0] - 1)
    return kernel.table_log_decay[entry], kernel.table_write[entry], kernel.table_read[entry]


def _features(
    q: Tensor, k: Tensor, *, kernel: LinearKernel, positions: Tensor, leaves: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """phi(q) [T, G, R, K], phi(k) [T, G, K] with factors folded in, and the log decay.

    `leaves` [T, 1] marks which keys really enter the state: they come W steps late, decayed accordingly.
    """
    log_decay, write, read = _write_factor(kernel, positions)
    phi_q, phi_k = kernel.phi(q), kernel.phi(k[:, :, None, :]).squeeze(2)
    if write is not None and read is not None:
        phi_q, phi_k = phi_q * read[:, :, None, None], phi_k * write[:, :, None]
    if leaves is not None:
        late = (log_decay * kernel.attention.window).exp()
        phi_k = phi_k * (leaves * late)[..., None]
    return phi_q, phi_k, log_decay


def _decode(
    q: Queries,
    k: Tensor,
    v: Tensor,
    *,
    kernel: LinearKernel,
    layout: StepLayout,
    state: LayerState,
) -> Tensor:
    slots, config = layout.decode_slots, kernel.attention
    exact, leaves, linear_k, linear_v = None, None, k, v
    kept = exact_rows(state)
    if kept is not None:
        near_keys, near_values = kept
        rows = layout.decode_window(window=config.window, sinks=config.sinks)
        leaves = rows.leaves
        linear_k = near_keys[slots, :, rows.ring_row].to(k.dtype)
        linear_v = near_values[slots, :, rows.ring_row].to(v.dtype)
        if not config.features.rotated:
            linear_k = layout.rotary.rows(0, layout.num_decode).undo(linear_k, earlier=config.window)
        for written, new in ((near_keys, k), (near_values, v)):
            written[slots, :, rows.ring_row] = new
            if config.sinks > 0:
                written[slots, :, rows.sink_row] = new
        scale = kernel.head_size**-0.5
        exact = decode_window(
            q.exact * scale,
            q.for_sinks * scale,
            keys=near_keys[slots].to(k.dtype),
            values=near_values[slots].to(v.dtype),
            num_sinks=config.sinks,
            visible=rows.visible,
        )
    phi_q, phi_k, log_decay = _features(
        q.linear, linear_k, kernel=kernel, positions=layout.decode_positions, leaves=leaves
    )
    normaliser = None if state.normaliser is None else state.normaliser[slots]
    linear = recurrent_step(
        phi_q, phi_k, linear_v, log_decay=log_decay, state=state.linear_state[slots].to(k.dtype), normaliser=normaliser
    )
    store_linear(linear, slots, state, positions=layout.decode_positions)
    return read_out(linear, exact, q.mix, kernel)


def _prefill(
    q: Queries,
    k: Tensor,
    v: Tensor,
    *,
    kernel: LinearKernel,
    step: StepLayout,
    state: LayerState,
) -> Tensor:
    exact, leaves, linear_k, linear_v = None, None, k, v
    layout = step.prefill
    assert layout is not None
    kept = exact_rows(state)
    if kept is not None:
        near_keys, near_values = kept
        window = layout.window(window=kernel.attention.window, sinks=kernel.attention.sinks)
        leaves = window.leaves
        stream_keys = _extend_andstore_linear(k, near_keys, layout, kernel)
        stream_values = _extend_andstore_linear(v, near_values, layout, kernel)
        linear_k, linear_v = stream_keys[window.leaving], stream_values[window.leaving]
        if not kernel.attention.features.rotated:
            rotary = step.rotary.rows(step.num_decode, len(step.positions))
            linear_k = rotary.undo(linear_k, earlier=kernel.attention.window)
        num_sinks, scale = kernel.attention.sinks, kernel.head_size**-0.5
        exact = prefill_window(
            q.exact * scale,
            q.for_sinks * scale,
            stream_keys=stream_keys,
            stream_values=stream_values,
            sink_keys=near_keys[layout.slots, :, :num_sinks].to(k.dtype),
            sink_values=near_values[layout.slots, :, :num_sinks].to(v.dtype),
            layout=layout,
            window=window,
        )
    phi_q, phi_k, log_decay = _features(q.linear, linear_k, kernel=kernel, positions=layout.positions, leaves=leaves)
    linear = chunked(
        phi_q,
        phi_k,
        linear_v,
        log_decay=log_decay,
        state=state.linear_state[layout.slots].to(k.dtype),
        normaliser=None if state.normaliser is None else state.normaliser[layout.slots],
        layout=layout,
    )
    last = layout.sequence_start + layout.sequence_length - 1
    store_linear(linear, layout.slots, state, positions=layout.positions[last])
    return read_out(linear, exact, q.mix, kernel)


def _extend_andstore_linear(new: Tensor, rows: ExactRows, layout: PrefillLayout, kernel: LinearKernel) -> Tensor:
    """The extended streams [N * W + T, G, d]; then writes the segment's sinks and last W tokens into `rows`."""
    window = layout.window(window=kernel.attention.window, sinks=kernel.attention.sinks)
    ring = rows[layout.slots[:, None], :, window.ring_rows].flatten(0, 1).to(new.dtype)
    writes = layout.writes(window=kernel.attention.window, sinks=kernel.attention.sinks)
    rows[layout.slots[writes.sink_sequences], :, writes.sink_rows] = new[writes.sink_tokens]
    rows[layout.slots[writes.sequences], :, writes.rows] = new[writes.tokens]
    return torch.cat([ring, new])
