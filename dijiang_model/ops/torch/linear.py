"""Causal linear attention with a decay per key-value head, in torch: chunked and recurrent.

Letters: T tokens, N sequences, G key-value heads, R query heads to each, K features, V value width,
M chunks, C chunk length. Nothing here repeats keys, values or states for grouped queries.

The recurrence is `S <- g S + phi(k) v^T`, `z <- g z + phi(k)`; the read-out `phi(q)^T S` and `phi(q)^T z`
(paper eq. 4 with a RetNet-style decay). Every exponent is a sum of log decays <= 0, so that no length overflows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dijiang_model.ops.layout import PrefillLayout


@dataclass(frozen=True, slots=True)
class LinearResult:
    """What the linear part of a layer answers, and the state it leaves.

    Attributes:
        numerator: [T, G, R, V].
        denominator: [T, G, R], or None when the read-out has none.
        state: [N, G, K, V] after the last token.
        normaliser: [N, G, K], or None.
    """

    numerator: Tensor
    denominator: Tensor | None
    state: Tensor
    normaliser: Tensor | None


def recurrent_step(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, *, log_decay: Tensor, state: Tensor, normaliser: Tensor | None
) -> LinearResult:
    """One token of each of N sequences.

    Args:
        phi_q: [N, G, R, K].
        phi_k: [N, G, K], write factors folded in.
        v: [N, G, V].
        log_decay: [N, G] or [G].
        state, normaliser: [N, G, K, V] and [N, G, K] before the token; not written.
    """
    decay = log_decay.exp()[..., None]
    state = torch.addcmul(state * decay[..., None], phi_k[..., None], v[..., None, :])
    numerator = phi_q @ state
    if normaliser is None:
        return LinearResult(numerator, None, state, None)
    normaliser = torch.addcmul(phi_k, normaliser, decay)
    denominator = (phi_q @ normaliser[..., None]).squeeze(-1)
    return LinearResult(numerator, denominator, state, normaliser)


def chunked(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    state: Tensor,
    normaliser: Tensor | None,
    layout: PrefillLayout,
) -> LinearResult:
    """Packed segments of any lengths, each from its own start state; differentiable.

    Args:
        phi_q: [T, G, R, K].
        phi_k: [T, G, K], write factors folded in.
        v: [T, G, V].
        log_decay: [T, G] or [G], <= 0.
        state, normaliser: [N, G, K, V] and [N, G, K] before the segments; not written.
    """
    num_queries = phi_q.shape[2]
    tokens, valid = layout.tokens, layout.valid
    q = phi_q[tokens].permute(0, 2, 3, 1, 4)  # [M, G, R, C, K]
    k = (phi_k[tokens] * valid[..., None, None]).transpose(1, 2)  # [M, G, C, K]
    values = v[tokens].transpose(1, 2)  # [M, G, C, V]
    steps = log_decay.expand(*tokens.shape, -1) if log_decay.dim() == 1 else log_decay[tokens]  # [M, C, G]
    total = (steps * valid[..., None]).cumsum(1).transpose(1, 2)  # [M, G, C]

    starts, end_state, end_normaliser = _carry(k, values, total, state=state, normaliser=normaliser, layout=layout)

    flat_q = q.flatten(2, 3)  # [M, G, R * C, K]
    scores = (flat_q @ k.transpose(-1, -2)).unflatten(2, (num_queries, -1))  # [M, G, R, C, C]
    scores = scores * _decay_matrix(total)[:, :, None]
    from_start = total.exp()[:, :, None, :, None]  # [M, G, 1, C, 1]
    numerator = (scores.flatten(2, 3) @ values).unflatten(2, (num_queries, -1))
    numerator = numerator + from_start * (flat_q @ starts.state).unflatten(2, (num_queries, -1))
    denominator = None
    if starts.normaliser is not None:
        before = (flat_q @ starts.normaliser[..., None]).unflatten(2, (num_queries, -1))
        denominator = scores.sum(-1) + (from_start * before).squeeze(-1)
        denominator = _to_tokens(denominator, layout)
    return LinearResult(_to_tokens(numerator, layout), denominator, end_state, end_normaliser)


@dataclass(frozen=True, slots=True)
class _ChunkStarts:
    """[M, G, K, V] and [M, G, K]: the state that each chunk starts from."""

    state: Tensor
    normaliser: Tensor | None


def _carry(
    k: Tensor, values: Tensor, total: Tensor, *, state: Tensor, normaliser: Tensor | None, layout: PrefillLayout
) -> tuple[_ChunkStarts, Tensor, Tensor | None]:
    """Passes the state from chunk to chunk; one round per chunk index, all sequences together."""
    last = total[..., -1:]  # [M, G, 1]
    decayed_k = k * (last - total).exp()[..., None]  # [M, G, C, K]
    added = decayed_k.transpose(-1, -2) @ values  # [M, G, K, V]
    kept = last.exp()  # [M, G, 1]
    added_normaliser = decayed_k.sum(2) if normaliser is not None else None
    starts: list[Tensor] = []
    normaliser_starts: list[Tensor] = []
    for chunks, sequences in layout.rounds:
        before = state[sequences]
        starts.append(before)
        state = state.index_copy(0, sequences, torch.addcmul(added[chunks], before, kept[chunks][..., None]))
        if normaliser is not None and added_normaliser is not None:
            before = normaliser[sequences]
            normaliser_starts.append(before)
            after = torch.addcmul(added_normaliser[chunks], before, kept[chunks])
            normaliser = normaliser.index_copy(0, sequences, after)
    order = torch.argsort(torch.cat([chunks for chunks, _ in layout.rounds]))
    chunk_starts = _ChunkStarts(
        torch.cat(starts)[order], torch.cat(normaliser_starts)[order] if normaliser_starts else None
    )
    return chunk_starts, state, normaliser


def _decay_matrix(total: Tensor) -> Tensor:
    """G_ij = exp(total_i - total_j) for i >= j, else 0: [M, G, C] -> [M, G, C, C]."""
    size = total.shape[-1]
    causal = torch.ones(size, size, dtype=torch.bool, device=total.device).tril()
    return (total[..., :, None] - total[..., None, :]).masked_fill(~causal, -torch.inf).exp()


def _to_tokens(x: Tensor, layout: PrefillLayout) -> Tensor:
    """[M, G, R, C, ...] -> [T, G, R, ...]."""
    return x.movedim(3, 1).flatten(0, 1)[layout.places]
