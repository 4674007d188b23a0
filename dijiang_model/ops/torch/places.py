"""Where a head's tokens are: sinks, a ring of recent ones, anchors, and who gives way to whom.

A layer's places lie head after head in one list of B, in each head first the Z sinks, then a ring of w (position t in
entry t mod w), then the anchors, in the order in which they first came; a new anchor takes the place of the one that it
drives out. What holds a token follows from the position alone, so a cleared slot is an empty state.

Whether a token is evicted depends on scores alone, so a whole segment's evictions are known before any attention
(`evictions`); the naive twin is `reference.anchors`.
"""

from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heappush, heappushpop
from math import inf

import torch
from torch import Tensor

from dijiang_model.config import AnchorConfig, AttentionConfig
from dijiang_model.ops.layout import sent

Anchor = tuple[float, int, int, int]
"""Priority, position, candidate and place: the order in which anchors give way."""


@dataclass(frozen=True, slots=True)
class PlaceTable:
    """The places of a layer's heads as a rectangle [G, J] with J the most places that a head has.

    Attributes:
        sinks: Z.
        anchors: the layer's setting.
        flat: [G, J] int64, index in the list of all heads' places; beyond a head's own its first one.
        is_place: [G, J] bool.
        window, num_anchors: [G] int64.
        columns: [J] int64, 0 to J - 1.
        head_of, column_of: [B] int64, of each of the layer's places.
    """

    sinks: int
    anchors: AnchorConfig
    flat: Tensor
    is_place: Tensor
    window: Tensor
    num_anchors: Tensor
    columns: Tensor
    head_of: Tensor
    column_of: Tensor

    def holds(self, seen: Tensor) -> Tensor:
        """[N, G, J] bool, which places hold a token after `seen` [N] tokens of each sequence."""
        count = seen[:, None, None]
        window, column = self.window[:, None], self.columns
        newest = count - 1 - (count - 1 - column + self.sinks) % window  # of the ring's entry in this column
        left = (count - self.sinks - window).clamp(min=0)
        is_sink, is_anchor = column < self.sinks, column >= self.sinks + window
        held = torch.where(is_sink, column < count, newest >= self.sinks)
        return torch.where(is_anchor, column - self.sinks - window < left, held) & self.is_place

    def of_token(self, positions: Tensor) -> Tensor:
        """[N, G] column of the tokens at positions [N] while they are recent, or sinks."""
        token = positions[:, None]
        return torch.where(token < self.sinks, token, self.sinks + token % self.window)


def place_table(attention: AttentionConfig, device: torch.device) -> PlaceTable:
    """The table of a layer with anchors; made once for each device."""
    assert attention.anchors is not None
    return _place_table(attention.anchors, attention.sinks, device)


@lru_cache(maxsize=256)
@torch.inference_mode(mode=False)
def _place_table(anchors: AnchorConfig, sinks: int, device: torch.device) -> PlaceTable:
    places = torch.tensor(anchors.places)
    first = places.cumsum(0) - places
    columns = torch.arange(max(anchors.places))
    is_place = columns < places[:, None]
    flat = first[:, None] + torch.where(is_place, columns, 0)
    window = torch.tensor(anchors.windows)
    own = [(head, column) for head, num_places in enumerate(anchors.places) for column in range(num_places)]
    tensors = (flat, is_place, window, places - sinks - window, columns, *torch.tensor(own).unbind(1))
    return PlaceTable(sinks, anchors, *(sent(tensor, device) for tensor in tensors))


def priorities(scores: Tensor, positions: Tensor, table: PlaceTable) -> Tensor:
    """In fp64, in which every number here is exact but for the age's share: the same in every implementation."""
    return scores.double() + table.anchors.age * positions.double()


@dataclass(frozen=True, slots=True)
class Evictions:
    """What a segment of T tokens from position `first` on does to one head.

    The candidates are the head's J columns as the segment finds them, then the T new tokens.

    Attributes:
        times: position of the query from which on a candidate is not held, inf: of none; by candidate.
        losers: candidate that is evicted in the step of each new token, -1: none.
        sources: candidate in each of the J columns afterwards.
    """

    times: list[float]
    losers: list[int]
    sources: list[int]


def evictions(
    *, first: int, num_tokens: int, sinks: int, window: int, limit: int, num_columns: int, priorities: list[float],
    positions: list[int],
) -> Evictions:  # fmt: skip
    """Follows one head through a segment.

    Args:
        sinks, window, limit: Z, w, and how many anchors there are places for.
        priorities, positions: of the candidates; those of a column that holds nothing are not read.
    """
    times = [inf] * len(priorities)
    losers, sources = [-1] * num_tokens, list(range(num_columns))
    before = min(limit, max(0, first - sinks - window))
    start = sinks + window
    anchors: list[Anchor] = [(priorities[i], positions[i], i, i) for i in range(start, start + before)]
    heapify(anchors)
    for step in range(num_tokens):
        t = first + step
        own = num_columns + step
        leaving = t - window
        if leaving >= sinks:
            ring = sinks + leaving % window
            candidate = ring if leaving < first else num_columns + leaving - first
            loser = _let_in(candidate, anchors, start + leaving - sinks, limit, priorities, positions, sources)
            if loser >= 0:
                losers[step], times[loser] = loser, t
        sources[t if t < sinks else sinks + t % window] = own
    return Evictions(times, losers, sources)


def _let_in(
    candidate: int, anchors: list[Anchor], next_place: int, limit: int, priorities: list[float],
    positions: list[int], sources: list[int],
) -> int:  # fmt: skip
    """A token that leaves the window joins the anchors or drives one out; the candidate that is evicted, or -1."""
    if limit == 0:
        return candidate
    priority, position = priorities[candidate], positions[candidate]
    if len(anchors) < limit:
        heappush(anchors, (priority, position, candidate, next_place))
        sources[next_place] = candidate
        return -1
    _, _, loser, place = anchors[0]
    if (priority, position) < anchors[0][:2]:
        return candidate
    heappushpop(anchors, (priority, position, candidate, place))
    sources[place] = candidate
    return loser


@dataclass(frozen=True, slots=True)
class SegmentEvictions:
    """`Evictions` of all heads of a layer: times [G, J + T] fp64, losers [G, T] and sources [G, J] int64."""

    times: Tensor
    losers: Tensor
    sources: Tensor


def segment_evictions(scores: Tensor, positions: Tensor, table: PlaceTable, *, first: Tensor) -> SegmentEvictions:
    """Of each head, head after head on the host, which waits for a device's numbers.

    Args:
        scores, positions: [G, J + T], shared scores and positions of the candidates.
        first: [1] int64, position of the first of the T new tokens.
    """
    rankings = priorities(scores, positions, table).tolist()
    windows, places, num_columns = table.anchors.windows, table.anchors.places, len(table.columns)
    found = [
        evictions(
            first=int(first),
            num_tokens=scores.shape[1] - num_columns,
            sinks=table.sinks,
            window=windows[g],
            limit=places[g] - table.sinks - windows[g],
            num_columns=num_columns,
            priorities=rankings[g],
            positions=own,
        )
        for g, own in enumerate(positions.tolist())
    ]
    return SegmentEvictions(
        torch.tensor([one.times for one in found], dtype=torch.float64, device=scores.device),
        torch.tensor([one.losers for one in found], device=scores.device),
        torch.tensor([one.sources for one in found], device=scores.device),
    )
