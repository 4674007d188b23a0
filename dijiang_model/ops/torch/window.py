"""Exact softmax over the window (recent tokens and sinks), unnormalised, in torch.

Both functions answer `sum_exact exp(s_tj - c_t) v_j` and `sum_exact exp(s_tj - c_t)` with c_t the largest exact
score, ready for the joint denominator with the linear part. Letters as in `ops.linear`; Z sinks, W window.
"""

import torch
from torch import Tensor

from dijiang_model.ops.layout import PrefillLayout, PrefillWindow


def decode_window(
    q: Tensor, q_sink: Tensor, *, keys: Tensor, values: Tensor, num_sinks: int, visible: Tensor
) -> tuple[Tensor, Tensor]:
    """One query per sequence against its exact rows.

    Args:
        q, q_sink: [N, G, R, d] queries, scaled, rotated for the ring and for the sinks.
        keys, values: [N, G, Z + W, d] exact rows, sinks first.
        visible: [N, 1, 1, Z + W] bool; at least one row each.

    Returns:
        numerator [N, G, R, d] and denominator [N, G, R].
    """
    keys_t = keys.transpose(-1, -2)
    scores = torch.cat([q_sink @ keys_t[..., :num_sinks], q @ keys_t[..., num_sinks:]], dim=-1)
    return _weigh(scores.masked_fill(~visible, -torch.inf), values)


def prefill_window(
    q: Tensor,
    q_sink: Tensor,
    *,
    stream_keys: Tensor,
    stream_values: Tensor,
    sink_keys: Tensor,
    sink_values: Tensor,
    layout: PrefillLayout,
    window: PrefillWindow,
) -> tuple[Tensor, Tensor]:
    """Chunks of queries, each against its band of the extended stream and its sequence's sinks.

    Args:
        q, q_sink: [T, G, R, d] queries, scaled.
        stream_keys, stream_values: [N * W + T, G, d], all rings in order of time, then all segments.
        sink_keys, sink_values: [N, G, Z, d].

    Returns:
        numerator [T, G, R, d] and denominator [T, G, R].
    """
    num_queries = q.shape[2]

    def by_chunk(x: Tensor) -> Tensor:  # [T, G, R, d] -> [M, G, R * C, d]
        return x[layout.tokens].permute(0, 2, 3, 1, 4).flatten(2, 3)

    band_keys = stream_keys[window.band].transpose(1, 2)  # [M, G, C + W - 1, d]
    band_values = stream_values[window.band].transpose(1, 2)
    keys = torch.cat([sink_keys[layout.chunk_sequence], band_keys], dim=2)
    values = torch.cat([sink_values[layout.chunk_sequence], band_values], dim=2)
    num_sinks = sink_keys.shape[2]
    scores = by_chunk(q) @ keys[:, :, num_sinks:].transpose(-1, -2)
    if num_sinks > 0:
        scores = torch.cat([by_chunk(q_sink) @ keys[:, :, :num_sinks].transpose(-1, -2), scores], dim=-1)
    visible = torch.cat([window.sinks_visible, window.band_visible], dim=2)[:, None, None]  # [M, 1, 1, C, Z + band]
    scores = scores.unflatten(2, (num_queries, -1)).masked_fill(~visible, -torch.inf).flatten(2, 3)
    numerator, denominator = _weigh(scores, values)
    numerator = numerator.unflatten(2, (num_queries, -1)).movedim(3, 1)  # [M, C, G, R, d]
    denominator = denominator.unflatten(2, (num_queries, -1)).movedim(3, 1)
    return numerator.flatten(0, 1)[layout.places], denominator.flatten(0, 1)[layout.places]


def _weigh(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """[..., Q, J] scores (-inf where hidden) and [..., J, d] values -> [..., Q, d] and [..., Q]."""
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights @ values, weights.sum(-1)
