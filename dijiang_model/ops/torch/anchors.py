"""The attention of one layer with anchors, in plain torch operations on any device: see `ops.AttentionOp`.

Exact softmax over a head's places, the linear part over what was evicted, one denominator. Keys and values are rounded
to int8 before they are first read, so that decode and prefill see the same numbers.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dijiang_model.kernel import LinearKernel
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import PrefillLayout, Rotary, StepLayout
from dijiang_model.ops.torch.branches import Queries, branch_queries, read_out, store_linear
from dijiang_model.ops.torch.linear import chunked, recurrent_step
from dijiang_model.ops.torch.places import PlaceTable, place_table, priorities, segment_evictions
from dijiang_model.ops.torch.rounding import packed_nibbles, round_rows, unpacked_nibbles
from dijiang_model.ops.torch.window import decode_window

LARGEST_NIBBLE = 7
QUERY_TOKENS = 128
"""Queries that meet all candidates at once."""


@dataclass(frozen=True, slots=True)
class PlaceRows:
    """Rows of places: int8 keys and values [..., d], their scales [...], positions and shared scores [...].

    Values of 4 bits are [..., d / 2] uint8.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor
    value_scales: Tensor
    positions: Tensor
    scores: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.keys, self.values, self.key_scales, self.value_scales, self.positions, self.scores)

    @classmethod
    def of(cls, state: LayerState) -> "PlaceRows":
        """Views of all slots' places, [P, B, ...]."""
        rows = (
            *(state.near_keys, state.near_values, state.near_key_scales, state.near_value_scales),
            *(state.near_positions, state.near_scores),
        )
        return cls(*(_present(tensor) for tensor in rows))

    @classmethod
    def rounded(cls, k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, *, value_bits: int) -> "PlaceRows":
        """New tokens: k, v [..., d]."""
        keys, key_scales = round_rows(k)
        values, value_scales = round_values(v, value_bits)
        if value_bits == 4:
            values = packed_nibbles(values)
        return cls(keys, values, key_scales, value_scales, positions.to(torch.int32), scores)

    def at(self, *index: Tensor) -> "PlaceRows":
        return PlaceRows(*(tensor[index] for tensor in self.tensors()))

    def write(self, index: tuple[Tensor, ...], rows: "PlaceRows") -> None:
        for tensor, new in zip(self.tensors(), rows.tensors(), strict=True):
            tensor[index] = new

    def wide_keys(self, dtype: torch.dtype) -> Tensor:
        return self.keys.to(dtype) * self.key_scales[..., None].to(dtype)

    def wide_values(self, dtype: torch.dtype) -> Tensor:
        codes = self.values if self.values.dtype == torch.int8 else unpacked_nibbles(self.values)
        return codes.to(dtype) * self.value_scales[..., None].to(dtype)


def round_values(v: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Values [..., d] as places hold them: int8 codes [..., d] and scales [...]."""
    return round_rows(v) if bits == 8 else round_rows(v, largest_code=LARGEST_NIBBLE)


class AnswerRows(Protocol):
    """A device's own way to some rows of a layer with anchors, in the place of the torch operations here."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
    ) -> Tensor:
        """Answers q [T, H, d], k and v [T, G, d] of these rows, as projected: [T, H, d]. Moves their states on."""


@dataclass(frozen=True, slots=True)
class AnchorKernels:
    """What a device has kernels for: decode rows, prefill segments. None: torch operations."""

    decode: AnswerRows | None = None
    prefill: AnswerRows | None = None


NO_KERNELS = AnchorKernels()


def anchored_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: LinearKernel,
    layout: StepLayout,
    state: LayerState,
    kernels: AnchorKernels = NO_KERNELS,
) -> Tensor:
    """[T, H, d]; `state.token_scores` has the scores of the step's tokens."""
    split, num_tokens = layout.num_decode, len(q)
    kinds = ((0, split, kernels.decode), (split, num_tokens, kernels.prefill))
    parts = {
        start: answer(q[start:stop], k[start:stop], v[start:stop], kernel=kernel, layout=layout, state=state)
        for start, stop, answer in kinds
        if start < stop and answer is not None
    }
    missing = [(start, stop) for start, stop, answer in kinds if start < stop and answer is None]
    if missing:
        parts |= _by_torch(q, k, v, missing, kernel=kernel, layout=layout, state=state)
    both = [parts[start] for start in sorted(parts)]
    return both[0] if len(both) == 1 else torch.cat([part.to(both[-1].dtype) for part in both])


def _by_torch(
    q: Tensor, k: Tensor, v: Tensor, ends: list[tuple[int, int]], *, kernel: LinearKernel, layout: StepLayout,
    state: LayerState,
) -> dict[int, Tensor]:  # fmt: skip
    """The rows between these ends, all decode rows or all segments each, [T, H, d] by their first one."""
    dtype = kernel.log_decay.dtype
    q, k, v, scores = q.to(dtype), layout.rotary.apply(k.to(dtype)), v.to(dtype), _present(state.token_scores)
    queries = branch_queries(q, kernel=kernel, layout=layout)
    positions = layout.positions[:, None].expand(-1, kernel.num_kv_heads)
    anchors = kernel.attention.anchors
    assert anchors is not None
    new = PlaceRows.rounded(k, v, positions, scores, value_bits=anchors.value_bits)
    found = {}
    for start, stop in ends:
        own = PlaceRows(*(tensor[start:stop] for tensor in new.tensors()))
        answer = _decode if start < layout.num_decode else _prefill
        rows = answer(queries.rows(start, stop), own, kernel=kernel, layout=layout, state=state)
        found[start] = rows.flatten(1, 2)
    return found


def _decode(q: Queries, new: PlaceRows, *, kernel: LinearKernel, layout: StepLayout, state: LayerState) -> Tensor:
    table, dtype = place_table(kernel.attention, q.exact.device), kernel.log_decay.dtype
    slots, positions = layout.decode_slots, layout.decode_positions
    rows = PlaceRows.of(state)
    loser, is_evicted = _take_in(new, rows, table, slots=slots, positions=positions, state=state)
    held = rows.at(slots[:, None, None], table.flat)
    scale = kernel.head_size**-0.5
    exact = decode_window(
        q.exact * scale,
        q.for_sinks * scale,
        keys=held.wide_keys(dtype),
        values=held.wide_values(dtype),
        num_sinks=table.sinks,
        visible=table.holds(positions + 1)[:, :, None],
    )
    linear = recurrent_step(
        kernel.phi(q.linear),
        linear_features(loser, is_evicted, positions, kernel=kernel, rotary=layout.rotary),
        loser.wide_values(dtype),
        log_decay=kernel.log_decay,
        state=state.linear_state[slots].to(dtype),
        normaliser=_present(state.normaliser)[slots],
    )
    store_linear(linear, slots, state, positions=positions)
    return read_out(linear, exact, q.mix, kernel)


def _take_in(
    new: PlaceRows, rows: PlaceRows, table: PlaceTable, *, slots: Tensor, positions: Tensor, state: LayerState
) -> tuple[PlaceRows, Tensor]:
    """Moves the places of N sequences on by a token each: who is evicted [N, G], and whether anyone is."""
    span, sinks, window = table.anchors.span, table.sinks, table.window
    heads, sequence = torch.arange(len(window), device=window.device), slots[:, None]
    shared = _remember(new.scores, state, slots=slots, positions=positions, span=span)
    own = table.of_token(positions)
    known = positions - span
    leaving = positions[:, None] - window
    leaves = leaving >= sinks
    leaver = rows.at(sequence, table.flat[heads, own])
    if span > 0:  # else it is the new token's own, and the leaver's has been there since it came
        at = table.flat[heads, table.of_token(known.clamp(min=0))]
        is_known = (known >= sinks)[:, None]
        rows.scores[sequence, at] = torch.where(is_known, shared, rows.scores[sequence, at])
        leaver_scores = torch.where(leaving == known[:, None], shared, leaver.scores)
    else:
        leaver_scores = leaver.scores
    leaver = replace(leaver, scores=leaver_scores)
    rank, anchors = _lowest_anchor(rows.at(sequence[:, :, None], table.flat), table)
    is_full = leaving - sinks >= table.num_anchors
    priority = priorities(leaver_scores, leaver.positions, table)
    wins = leaves & (~is_full | (priority >= rank))
    target = torch.where(is_full, anchors, sinks + window + leaving - sinks)
    target = table.flat[heads, torch.where(wins, target, own)]  # else to its own place, where it is overwritten
    loser = rows.at(sequence, target)
    rows.write((sequence, target), leaver)
    rows.write((sequence, table.flat[heads, own]), new)
    return loser, leaves & is_full


def _remember(scores: Tensor, state: LayerState, *, slots: Tensor, positions: Tensor, span: int) -> Tensor:
    """Notes the new scores [N, G]; the shared score of the tokens `span` before them, [N, G]."""
    recent, size = _present(state.recent_scores), 2 * span + 1
    recent[slots, :, positions % size] = scores
    entries = torch.arange(size, device=positions.device)
    exists = (positions[:, None] - (positions[:, None] - entries) % size) >= 0
    shared: Tensor = recent[slots].masked_fill(~exists[:, None], -torch.inf).amax(-1)
    return shared


def _lowest_anchor(held: PlaceRows, table: PlaceTable) -> tuple[Tensor, Tensor]:
    """Priority and column [N, G] of the anchor that goes next, as if all places were taken: of equals the oldest."""
    is_anchor = (table.columns >= (table.sinks + table.window)[:, None]) & table.is_place
    ranking = priorities(held.scores, held.positions, table).masked_fill(~is_anchor, torch.inf)
    lowest = ranking.amin(-1)
    is_lowest = (ranking == lowest[..., None]) & is_anchor
    age = torch.where(is_lowest, held.positions, torch.iinfo(torch.int32).max)
    return lowest, age.argmin(-1)


def linear_features(
    loser: PlaceRows, is_evicted: Tensor, positions: Tensor, *, kernel: LinearKernel, rotary: Rotary
) -> Tensor:
    """phi(k) [T, G, K] of the evicted, decayed by their distance to the positions [T]; zeros where there are none.

    Args:
        is_evicted: [T, G] bool.
        rotary: of any positions, for its frequencies.
    """
    keys = loser.wide_keys(kernel.log_decay.dtype)
    if not kernel.attention.features.rotated:
        at = Rotary.at(loser.positions.flatten(), frequencies=rotary.frequencies, dtype=keys.dtype)
        keys = at.undo(keys.flatten(0, 1)[:, None]).view_as(keys)
    return decayed_features(keys, is_evicted, positions[:, None] - loser.positions, kernel=kernel)


def decayed_features(keys: Tensor, is_evicted: Tensor, distance: Tensor, *, kernel: LinearKernel) -> Tensor:
    """As `linear_features`, of keys [T, G, d] as the features read them, so many tokens [T, G] ago."""
    weight = (kernel.log_decay * torch.where(is_evicted, distance, 0)).exp()
    features = kernel.phi(keys[:, :, None, :]).squeeze(2) * weight[..., None]
    # A place that holds nothing yet may hold anything: nothing of it may come through.
    return torch.where(is_evicted[..., None], features, 0.0)


def _prefill(q: Queries, new: PlaceRows, *, kernel: LinearKernel, layout: StepLayout, state: LayerState) -> Tensor:
    step, dtype = layout.prefill, kernel.log_decay.dtype
    assert step is not None
    segments = [
        _segment(q, new, n, layout=step, kernel=kernel, state=state) for n in range(step.num_sequences)
    ]  # each moves its slot's places on
    loser = PlaceRows(*(torch.cat(parts) for parts in zip(*(s.loser.tensors() for s in segments), strict=True)))
    is_evicted = torch.cat([segment.is_evicted for segment in segments])
    exact = (torch.cat([s.exact[0] for s in segments]), torch.cat([s.exact[1] for s in segments]))
    linear = chunked(
        kernel.phi(q.linear),
        linear_features(loser, is_evicted, step.positions, kernel=kernel, rotary=layout.rotary),
        torch.where(is_evicted[..., None], loser.wide_values(dtype), 0.0),
        log_decay=kernel.log_decay,
        state=state.linear_state[step.slots].to(dtype),
        normaliser=_present(state.normaliser)[step.slots],
        layout=step,
    )
    last = step.sequence_start + step.sequence_length - 1
    store_linear(linear, step.slots, state, positions=step.positions[last])
    return read_out(linear, exact, q.mix, kernel)


@dataclass(frozen=True, slots=True)
class _Segment:
    """Of T tokens: the exact part (numerator [T, G, R, d], denominator [T, G, R]) and who was evicted [T, G]."""

    exact: tuple[Tensor, Tensor]
    loser: PlaceRows
    is_evicted: Tensor


def _segment(
    q: Queries,
    new: PlaceRows,
    number: int,
    *,
    layout: PrefillLayout,
    kernel: LinearKernel,
    state: LayerState,
) -> _Segment:
    table, dtype = place_table(kernel.attention, q.exact.device), kernel.log_decay.dtype
    tokens = slice(layout.starts[number], layout.starts[number + 1])
    slot, first = layout.slots[number : number + 1], layout.positions[tokens.start : tokens.start + 1]
    rows, own = PlaceRows.of(state), q.rows(tokens.start, tokens.stop)
    held = rows.at(slot, table.flat)  # [G, J, ...]
    fresh = PlaceRows(*(tensor[tokens].transpose(0, 1) for tensor in new.tensors()))  # [G, T, ...]
    both = (torch.cat(pair, dim=1) for pair in zip(held.tensors(), fresh.tensors(), strict=True))
    candidates = PlaceRows(*both)
    share_scores_(candidates.scores, fresh.scores, _present(state.recent_scores), table, slot=slot, first=first)
    found = segment_evictions(candidates.scores, candidates.positions, table, first=first)
    found.times[:, : len(table.columns)].masked_fill_(~table.holds(first)[0], -1)
    exact = attend_until(
        own,
        candidates.wide_keys(dtype),
        candidates.wide_values(dtype),
        positions=candidates.positions,
        times=found.times,
        query_positions=layout.positions[tokens],
        sinks=table.sinks,
        scale=kernel.head_size**-0.5,
    )
    heads = torch.arange(len(table.window), device=q.exact.device)[:, None]
    kept = candidates.at(heads, found.sources)
    rows.write((slot,), kept.at(table.head_of, table.column_of))
    loser = candidates.at(heads, found.losers.clamp(min=0))
    return _Segment(exact, PlaceRows(*(t.transpose(0, 1) for t in loser.tensors())), (found.losers >= 0).T)


def share_scores_(
    scores: Tensor, fresh: Tensor, recent: Tensor, table: PlaceTable, *, slot: Tensor, first: Tensor
) -> None:
    """Shares the scores of a segment's tokens in the candidates' [G, J + T], and notes the last ones in `recent`.

    Args:
        fresh: [G, T] of the new tokens alone.
        recent: [P, G, 2 span + 1] of all slots, written at `slot` [1].
        first: [1], position of the first new token.
    """
    size, span, num_tokens = table.anchors.num_scores, table.anchors.span, fresh.shape[1]
    earlier, own = first + torch.arange(-size, 0, device=first.device), recent[slot][0]
    before = own[:, earlier % size].masked_fill(earlier < 0, -torch.inf)
    shared = torch.cat([before, fresh], 1).unfold(1, size, 1)[:, 1:].amax(-1)  # of positions first - span and on
    positions = first - span + torch.arange(num_tokens, device=first.device)
    shares = positions >= table.sinks  # sinks keep their own
    is_old = min(span, num_tokens)
    # Tokens of the window, no two of one entry; what is no such token's entry is written as it is.
    columns = (table.sinks + positions[:is_old] % table.window[:, None]).contiguous()
    old = torch.where(shares[:is_old], shared[:, :is_old].to(scores.dtype), scores.gather(1, columns))
    scores.scatter_(1, columns, old)
    new = scores[:, len(table.columns) : scores.shape[1] - is_old]
    new.copy_(torch.where(shares[is_old:], shared[:, is_old:].to(scores.dtype), new))
    last = torch.arange(max(0, num_tokens - size), num_tokens, device=first.device)
    recent[slot[:, None], :, (first + last) % size] = fresh[:, -size:].T


def attend_until(
    q: Queries, keys: Tensor, values: Tensor, *, positions: Tensor, times: Tensor, query_positions: Tensor, sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax over the candidates that are held when each of T queries comes, unnormalised as in `ops.window`.

    Args:
        q: [T, G, R, d].
        keys, values: [G, J, d].
        positions: [G, J] of the candidates; a query sees none that comes after it.
        times: [G, J]; a query at position t sees candidates with t < time.
        query_positions: [T].

    Returns:
        numerator [T, G, R, d] and denominator [T, G, R].
    """
    is_sink = (positions < sinks)[:, None, None]  # [G, 1, 1, J]
    parts = []
    for start in range(0, len(query_positions), QUERY_TOKENS):
        part = q.rows(start, start + QUERY_TOKENS)
        at = query_positions[start : start + QUERY_TOKENS, None]
        visible = (positions[:, None] <= at) & (at < times[:, None])  # [G, C, J]
        exact, sink = (x.permute(1, 2, 0, 3) * scale for x in (part.exact, part.for_sinks))  # [G, R, C, d]
        dots = exact @ keys[:, None].transpose(-1, -2)
        if sinks > 0:
            dots = torch.where(is_sink, sink @ keys[:, None].transpose(-1, -2), dots)
        dots = dots.masked_fill(~visible[:, None], -torch.inf)
        weights = (dots - dots.amax(-1, keepdim=True)).exp()
        parts.append(((weights @ values[:, None]).permute(2, 0, 1, 3), weights.sum(-1).permute(2, 0, 1)))
    numerators, denominators = zip(*parts, strict=True)
    return torch.cat(numerators), torch.cat(denominators)


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "the state of a layer with anchors has all of its parts"
    return tensor
