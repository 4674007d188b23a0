"""The anchored hybrid: exact softmax over sinks, a recent window and anchors; linear attention over the evicted.

Each key-value head g has places for s sinks, its last w tokens and A anchors. A token that leaves the window stays as
an anchor for as long as it is among the A of the highest priority that have left; whoever is not, is evicted for good
and enters the linear part. With s_t the score of token t, a multiple of `grid`, and a reach of `span` tokens:

    p_j = max(s_{j-span} .. s_{j+span}) + age * j        tokens that do not exist are left out
    e_j = the first t at which j has left the window and A others of higher (p, position) have too; sinks: never
    y_t = one softmax over the j <= t < e_j, joined with the linear part over those with e_j <= t as in `hybrid`

Priorities do not depend on attention, so e_j is known from the scores alone. Of equal priorities the older one goes.
Keys and values are the rounded ones throughout: a place holds int8, and a token is rounded before it is first read.
"""

from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

from dijiang_model.reference.hybrid import HybridInputs
from dijiang_model.reference.linear import LinearState


@dataclass(frozen=True, slots=True)
class AnchorRules:
    """One layer's places and priorities.

    Attributes:
        sinks: s.
        windows, anchors: w >= max(1, span) and A >= 0 of each key-value head.
        age: what a token's priority gains with each position.
        span: tokens on either side whose scores a token shares.
    """

    sinks: int
    windows: tuple[int, ...]
    anchors: tuple[int, ...]
    age: float
    span: int


@dataclass(frozen=True, slots=True)
class Place:
    """A token in a head's places: position, shared score (None: not known yet), k [d], v [V], phi(k) [K]."""

    position: int
    score: float | None
    k: Tensor
    v: Tensor
    phi_k: Tensor


@dataclass(frozen=True, slots=True)
class AnchoredHead:
    """What remains of a sequence in one key-value head.

    Attributes:
        sinks, window: oldest first.
        anchors: in the order in which they left the window.
        recent: the last 2 span + 1 scores, oldest first.
        linear: sums over the evicted, each decayed by its distance to the last token; s [K, V], z [K].
    """

    sinks: tuple[Place, ...]
    window: tuple[Place, ...]
    anchors: tuple[Place, ...]
    recent: tuple[float, ...]
    linear: LinearState


@dataclass(frozen=True, slots=True)
class AnchoredState:
    """A sequence after `num_seen` tokens, head by head. Nothing writes it: a draft that is given up leaves no trace."""

    num_seen: int
    heads: tuple[AnchoredHead, ...]

    @staticmethod
    def empty(x: HybridInputs) -> "AnchoredState":
        """Before the first token."""
        linear = LinearState(
            torch.zeros(x.phi_k.shape[2], x.v.shape[2], dtype=x.v.dtype), torch.zeros(x.phi_k.shape[2], dtype=x.v.dtype)
        )
        return AnchoredState(0, (AnchoredHead((), (), (), (), linear),) * x.k.shape[1])


def token_scores(x: Tensor, weight: Tensor, bias: Tensor, *, grid: float) -> Tensor:
    """s_t of the layer's normed inputs x [T, D] with weight [G, D] and bias [G]: [T, G], multiples of `grid`."""
    return ((x @ weight.T + bias) / grid).round() * grid


def shared_scores(scores: list[float], span: int) -> list[float]:
    """The largest score within `span` tokens of each."""
    return [max(scores[max(j - span, 0) : j + span + 1]) for j in range(len(scores))]


def eviction_times(scores: Tensor, rules: AnchorRules, group: int) -> list[float]:
    """e_j of each of T tokens, given that no others came before; inf: not by token T - 1. `scores` [T]."""
    shared = shared_scores(scores.tolist(), rules.span)
    rank = [(score + rules.age * j, j) for j, score in enumerate(shared)]
    window, limit = rules.windows[group], rules.anchors[group]
    times = [inf] * len(rank)
    for j in range(rules.sinks, len(rank)):
        for t in range(j + window, len(rank)):
            have_left = range(rules.sinks, t - window + 1)
            if sum(rank[other] > rank[j] for other in have_left) >= limit:
                times[j] = t
                break
    return times


def anchored_parallel(x: HybridInputs, scores: Tensor, rules: AnchorRules) -> Tensor:
    """The definition, pair by pair, from the beginning of the sequence: y [T, H, V]. `scores` [T, G]."""
    num_tokens, num_heads, size = x.q.shape
    output = torch.zeros((num_tokens, num_heads, x.v.shape[-1]), dtype=x.v.dtype)
    for h in range(num_heads):
        g = h * x.k.shape[1] // num_heads
        times = torch.tensor(eviction_times(scores[:, g], rules, g), dtype=torch.float64)
        for t in range(num_tokens):
            j = torch.arange(t + 1)
            is_held = t < times[: t + 1]
            k, v = x.k[: t + 1, g], x.v[: t + 1, g]
            dots = torch.where(j < rules.sinks, k @ x.q_sink[t, h], k @ x.q[t, h]) / sqrt(size)
            exact = torch.where(is_held, (dots - dots[is_held].max()).exp(), 0)
            linear = x.beta[t, h] * (x.log_decay[g] * (t - j)).exp() * (x.phi_k[: t + 1, g] @ x.phi_q[t, h])
            weights = torch.where(is_held, exact, linear)
            output[t, h] = weights @ v / weights.sum()
    return output


def anchored_recurrent(
    x: HybridInputs, scores: Tensor, rules: AnchorRules, *, state: AnchoredState | None = None
) -> tuple[Tensor, AnchoredState]:
    """The same with a constant-size state, one token at a time: y [T, H, V] and the state after the last."""
    state = AnchoredState.empty(x) if state is None else state
    num_heads, num_groups = x.q.shape[1], x.k.shape[1]
    heads, outputs = list(state.heads), []
    for row in range(x.q.shape[0]):
        position = state.num_seen + row
        for g in range(num_groups):
            new = Place(position, None, x.k[row, g], x.v[row, g], x.phi_k[row, g])
            gamma = x.log_decay[g].exp()
            heads[g] = _taken_in(heads[g], new, float(scores[row, g]), rules, group=g, gamma=gamma)
        answers = [_read(x, heads[h * num_groups // num_heads], row=row, head=h) for h in range(num_heads)]
        outputs.append(torch.stack(answers))
    return torch.stack(outputs), AnchoredState(state.num_seen + x.q.shape[0], tuple(heads))


def _taken_in(
    head: AnchoredHead, new: Place, score: float, rules: AnchorRules, *, group: int, gamma: Tensor
) -> AnchoredHead:
    """A head after one more token: scores first, then whoever leaves the window, then the new token's own place."""
    recent = (*head.recent, score)[-(2 * rules.span + 1) :]
    known = new.position - rules.span
    window = tuple(
        Place(place.position, max(recent), place.k, place.v, place.phi_k) if place.position == known else place
        for place in head.window
    )
    sinks = head.sinks
    if new.position < rules.sinks:
        sinks = (*sinks, new)
    else:
        own = Place(new.position, score, new.k, new.v, new.phi_k) if rules.span == 0 else new
        window = (*window, own)
    s, z, anchors = head.linear.s * gamma, head.linear.z * gamma, head.anchors
    if window and window[0].position == new.position - rules.windows[group]:
        anchors, window = (*anchors, window[0]), window[1:]
        if len(anchors) > rules.anchors[group]:
            loser = min(anchors, key=lambda place: _rank(place, rules))
            anchors = tuple(place for place in anchors if place is not loser)
            weight = gamma ** (new.position - loser.position) * loser.phi_k
            s, z = s + weight[:, None] * loser.v, z + weight
    return AnchoredHead(sinks, window, anchors, recent, LinearState(s, z))


def _rank(place: Place, rules: AnchorRules) -> tuple[float, int]:
    assert place.score is not None, "a window is longer than the span"
    return place.score + rules.age * place.position, place.position


def _read(x: HybridInputs, held: AnchoredHead, *, row: int, head: int) -> Tensor:
    """y [V] of token `row`, which has its place already."""
    places = (*held.sinks, *held.window, *held.anchors)
    keys, values = torch.stack([place.k for place in places]), torch.stack([place.v for place in places])
    is_sink = torch.arange(len(places)) < len(held.sinks)
    dots = torch.where(is_sink, keys @ x.q_sink[row, head], keys @ x.q[row, head]) / sqrt(keys.shape[1])
    exact = (dots - dots.max()).exp()
    phi = x.beta[row, head] * x.phi_q[row, head]
    return (exact @ values + phi @ held.linear.s) / (exact.sum() + phi @ held.linear.z)


def anchored_chunk(
    x: HybridInputs, scores: Tensor, rules: AnchorRules, *, state: AnchoredState | None = None
) -> tuple[Tensor, AnchoredState]:
    """The same, all tokens of a chunk at once from their eviction times, from any state on."""
    state = AnchoredState.empty(x) if state is None else state
    num_tokens, num_heads, num_groups = x.q.shape[0], x.q.shape[1], x.k.shape[1]
    output = torch.zeros((num_tokens, num_heads, x.v.shape[-1]), dtype=x.v.dtype)
    heads = []
    for g in range(num_groups):
        own = [h for h in range(num_heads) if h * num_groups // num_heads == g]
        answers, head = _chunk_of_head(x, scores[:, g], rules, state, group=g, query_heads=own)
        output[:, own] = answers
        heads.append(head)
    return output, AnchoredState(state.num_seen + num_tokens, tuple(heads))


def _chunk_of_head(
    x: HybridInputs, scores: Tensor, rules: AnchorRules, state: AnchoredState, *, group: int, query_heads: list[int]
) -> tuple[Tensor, AnchoredHead]:
    """[T, R, V] of the query heads of one key-value head, and what remains."""
    first, num_tokens = state.num_seen, scores.shape[0]
    head, gamma = state.heads[group], x.log_decay[group].exp()
    new = [Place(first + i, None, x.k[i, group], x.v[i, group], x.phi_k[i, group]) for i in range(num_tokens)]
    places = [*head.sinks, *head.window, *head.anchors, *new]
    recent = [*head.recent, *scores.tolist()]
    places = [_with_score(place, recent, rules, last=first + num_tokens - 1) for place in places]
    times = _chunk_times(places, rules, group=group, first=first, num_tokens=num_tokens)
    answers = torch.zeros((num_tokens, len(query_heads), x.v.shape[-1]), dtype=x.v.dtype)
    for i in range(num_tokens):
        t = first + i
        held = [place for place, time in zip(places, times, strict=True) if place.position <= t < time]
        linear = _linear_at(head.linear, places, times, gamma=gamma, first=first, t=t)
        view = AnchoredHead(
            tuple(place for place in held if place.position < rules.sinks),
            tuple(place for place in held if place.position >= rules.sinks),
            (),
            (),
            linear,
        )
        answers[i] = torch.stack([_read(x, view, row=i, head=h) for h in query_heads])
    last = first + num_tokens - 1
    left = [place for place, time in zip(places, times, strict=True) if time > last and place.position >= rules.sinks]
    inside = sorted((p for p in left if p.position > last - rules.windows[group]), key=lambda p: p.position)
    anchors = tuple(sorted((p for p in left if p not in inside), key=lambda p: p.position))
    sinks = tuple(place for place in places if place.position < rules.sinks)
    linear = _linear_at(head.linear, places, times, gamma=gamma, first=first, t=last)
    return answers, AnchoredHead(sinks, tuple(inside), anchors, tuple(recent[-(2 * rules.span + 1) :]), linear)


def _with_score(place: Place, recent: list[float], rules: AnchorRules, *, last: int) -> Place:
    """A place with its shared score, once all the tokens beside it are there; a sink needs none.

    Args:
        recent: the last scores, up to that of token `last`.
    """
    if place.score is not None or place.position < rules.sinks or place.position + rules.span > last:
        return place
    index = place.position - last + len(recent) - 1
    score = max(recent[max(index - rules.span, 0) : index + rules.span + 1])
    return Place(place.position, score, place.k, place.v, place.phi_k)


def _chunk_times(places: list[Place], rules: AnchorRules, *, group: int, first: int, num_tokens: int) -> list[float]:
    """e_j of each place; inf beyond the chunk."""
    window, limit = rules.windows[group], rules.anchors[group]
    times = [inf] * len(places)
    for t in range(first, first + num_tokens):
        have_left = [
            i for i, place in enumerate(places) if rules.sinks <= place.position <= t - window and times[i] == inf
        ]
        if len(have_left) > limit:
            loser = min(have_left, key=lambda i: _rank(places[i], rules))
            times[loser] = t
    return times


def _linear_at(
    linear: LinearState, places: list[Place], times: list[float], *, gamma: Tensor, first: int, t: int
) -> LinearState:
    """The linear part of token t: what there was before token `first`, and whoever was evicted since."""
    s, z = linear.s * gamma ** (t - first + 1), linear.z * gamma ** (t - first + 1)
    for place, time in zip(places, times, strict=True):
        if time <= t:
            weight = gamma ** (t - place.position) * place.phi_k
            s, z = s + weight[:, None] * place.v, z + weight
    return LinearState(s, z)
