"""Attention with anchors for training: whole segments from an empty state, differentiable, nothing written in place.

Who is held follows from scores, which get no gradient. Keys and values are rounded as places hold them; gradients pass
the rounding unchanged.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dijiang_model.kernel import LinearKernel
from dijiang_model.ops.layout import PrefillLayout
from dijiang_model.ops.torch.anchors import attend_until, decayed_features, round_values
from dijiang_model.ops.torch.branches import Queries
from dijiang_model.ops.torch.linear import LinearResult, chunked
from dijiang_model.ops.torch.places import PlaceTable, place_table, segment_evictions


@dataclass(frozen=True, slots=True)
class SegmentPlaces:
    """Who is held and who is evicted in N segments, T tokens in all.

    Attributes:
        times: for each segment [G, its tokens] fp64: the offset of the query from which on a token is not held.
        losers: [T, G] int64, the token that is evicted in the step of each, any where there is none.
        is_evicted: [T, G] bool.
        distance: [T, G] int64, how long ago the evicted token came.
    """

    times: list[Tensor]
    losers: Tensor
    is_evicted: Tensor
    distance: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, scores: Tensor, layout: PrefillLayout, kernel: LinearKernel) -> "SegmentPlaces":
        """From the scores [T, G] of the segments' tokens."""
        table = place_table(kernel.attention, scores.device)
        times, losers = [], []
        for start, stop in zip(layout.starts, layout.starts[1:], strict=False):
            own_times, own_losers = _segment(scores[start:stop].T, table)
            times.append(own_times)
            losers.append(torch.where(own_losers >= 0, own_losers + start, -1).T)
        loser = torch.cat(losers)
        token = torch.arange(len(scores), device=scores.device)[:, None]
        index = torch.where(loser >= 0, loser, token)
        return cls(times, index, loser >= 0, token - index)


def _segment(scores: Tensor, table: PlaceTable) -> tuple[Tensor, Tensor]:
    """Times [G, T] and losers [G, T] of one segment, from its scores [G, T]."""
    span, num_columns, num_tokens = table.anchors.span, len(table.columns), scores.shape[1]
    around = torch.nn.functional.pad(scores, (span, span), value=-torch.inf)
    shared = around.unfold(1, table.anchors.num_scores, 1).amax(-1)
    nothing = scores.new_zeros((len(scores), num_columns))  # the columns of an empty state
    positions = torch.arange(-num_columns, num_tokens, device=scores.device).expand(len(scores), -1)
    first = torch.zeros(1, dtype=torch.int64, device=scores.device)
    found = segment_evictions(torch.cat([nothing, shared], 1), positions, table, first=first)
    return found.times[:, num_columns:], torch.where(found.losers >= 0, found.losers - num_columns, -1)


def rounded(x: Tensor, bits: int = 8) -> Tensor:
    """Rows [..., d] as places hold them in so many bits; gradients pass unchanged."""
    with torch.no_grad():
        codes, scales = round_values(x, bits)
        error = codes.to(x.dtype) * scales[..., None].to(x.dtype) - x
    return x + error


def exact_places(
    q: Queries, k: Tensor, v: Tensor, *, places: SegmentPlaces, layout: PrefillLayout, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax over what each head holds, unnormalised: numerator [T, G, R, d] and denominator [T, G, R].

    Args:
        k, v: [T, G, d], rotated and rounded.
    """
    parts = []
    for number, times in enumerate(places.times):
        start, stop = layout.starts[number], layout.starts[number + 1]
        parts.append(_exact_of_segment(q.rows(start, stop), k[start:stop], v[start:stop], times, sinks, scale))
    numerators, denominators = zip(*parts, strict=True)
    return torch.cat(numerators), torch.cat(denominators)


def _exact_of_segment(
    q: Queries, k: Tensor, v: Tensor, times: Tensor, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Recomputed in the backward pass: weights of all pairs of tokens would not fit."""
    offsets = torch.arange(len(k), device=k.device)

    def exact(exact_q: Tensor, sink_q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return attend_until(
            Queries(exact_q, exact_q, exact_q, sink_q),
            keys.transpose(0, 1),
            values.transpose(0, 1),
            positions=offsets.expand(keys.shape[1], -1),
            times=times,
            query_positions=offsets,
            sinks=sinks,
            scale=scale,
        )

    rows = (q.exact, q.for_sinks, k, v)
    if not torch.is_grad_enabled():
        return exact(*rows)
    answer: tuple[Tensor, Tensor] = checkpoint(exact, *rows, use_reentrant=False)
    return answer


def linear_places(
    phi_q: Tensor, linear_k: Tensor, v: Tensor, *, places: SegmentPlaces, kernel: LinearKernel, layout: PrefillLayout
) -> LinearResult:
    """The linear part over the evicted; phi_q [T, G, R, K], linear_k (as the features read it) and v [T, G, d]."""
    index = places.losers[..., None].expand_as(linear_k)
    phi_k = decayed_features(linear_k.gather(0, index), places.is_evicted, places.distance, kernel=kernel)
    shape = (layout.num_sequences, *phi_k.shape[1:])
    return chunked(
        phi_q,
        phi_k,
        torch.where(places.is_evicted[..., None], v.gather(0, index), 0.0),
        log_decay=kernel.log_decay,
        state=phi_k.new_zeros((*shape, v.shape[-1])),
        normaliser=phi_k.new_zeros(shape),
        layout=layout,
    )
