"""Who gives way in a segment of a sequence, in a layer with anchors; found before any attention, by counting.

Whoever leaves the window joins the anchors and the lowest one goes: after every step the L highest of all that have
left are held. So a candidate is evicted in the first step by which L others that outrank it have left, and each one
counts for itself. Candidates of a head are its J columns as the segment finds them, then the T new tokens; those of a
step's N segments lie one segment after another. The naive twin is `ops.torch.places.evictions`.
"""

import triton
import triton.language as tl

from dijiang_model.ops.triton.kernels.parts import INDICES

SIZES = ("num_columns",)
"""Every layer has its own."""


@triton.jit
def priority_of(score, place, age):
    """What the anchors are ranked by, in fp64: a score [...] fp32, and `age` for each position [...] int32.

    The bound keeps product and sum apart: fused, equals of other implementations would not be equal here.
    """
    return score.to(tl.float64) + tl.maximum(age * place.to(tl.float64), 0.0)


@triton.jit
def candidate_of(token, first, window, num_columns, SINKS: tl.constexpr):
    """Candidate that is the token at a position [...] as it leaves the window of a segment from `first` on."""
    return tl.where(token < first, SINKS + token % window, num_columns + token - first)


@triton.jit
def outranks(priority, place, others, other_places):
    """[J, T] int32, 1 where another [T] ranks before one of [J]: of equals the newer."""
    is_higher = others[None, :] > priority[:, None]
    is_newer = (others[None, :] == priority[:, None]) & (other_places[None, :] > place[:, None])
    return (is_higher | is_newer).to(tl.int32)


@triton.jit
def leaving_step(j, first, window, num_columns, num_tokens, SINKS: tl.constexpr):
    """Step in which candidates [J] leave the window; `num_tokens` for those that do not leave in this segment."""
    in_ring = (j >= SINKS) & (j < SINKS + window)
    newest = first - 1 - (first - 1 - (j - SINKS) + window) % window
    token = tl.where(j < num_columns, newest, first + j - num_columns)
    leaves = (in_ring | (j >= num_columns)) & (token >= SINKS)
    return tl.where(leaves, tl.minimum(token + window - first, num_tokens), num_tokens)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=INDICES)
def evictions_kernel(
    candidate_scores, candidate_places, positions, starts, windows, limits, ages, times, losers, num_columns,
    SINKS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (N, G, ceil((J + T) / BLOCK_J)), T the most of a segment: when each candidate is evicted, and who is in each
    step.

    Args:
        candidate_scores, candidate_places: by segment [G, J + T], shared scores fp32 and positions int32.
        positions, starts: of the segments' tokens, and the first token of each segment, int64.
        times: by segment [G, J + T] fp64, written: position of the query from which on a candidate is not held, inf: of
            none.
        losers: by segment [G, T] int64, written: candidate that is evicted as each new token comes, -1: none.
    """
    n, g, num_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    begin_row = tl.load(starts + n)
    num_tokens = (tl.load(starts + n + 1) - begin_row).to(tl.int32)
    first = tl.load(positions + begin_row).to(tl.int32)
    window, limit = tl.load(windows + g).to(tl.int32), tl.load(limits + g).to(tl.int32)
    age = tl.load(ages)
    num_candidates = num_columns + num_tokens
    segment = num_heads * (n * num_columns + begin_row) + g * num_candidates
    scores, places = candidate_scores + segment, candidate_places + segment
    own_losers = losers + num_heads * begin_row + g * num_tokens
    start = SINKS + window  # column of the first anchor
    before, begin = tl.minimum(limit, tl.maximum(first - start, 0)), tl.maximum(start - first, 0)
    j = tl.program_id(2) * BLOCK_J + tl.arange(0, BLOCK_J)
    joins = leaving_step(j, first, window, num_columns, num_tokens, SINKS)
    joins = tl.where((j >= start) & (j < start + before), -1, joins)
    is_live = (joins < num_tokens) & (j < num_candidates)
    place = tl.load(places + j, mask=is_live, other=0)
    priority = priority_of(tl.load(scores + j, mask=is_live, other=0.0), place, age)
    lane, ahead = tl.arange(0, BLOCK_T), tl.zeros([BLOCK_J], tl.int32)
    num_open = tl.sum(is_live.to(tl.int32), 0)
    for column in range(0, tl.where(num_open > 0, before, 0), BLOCK_T):
        i = column + lane
        other_place = tl.load(places + start + i, mask=i < before, other=0)
        other = priority_of(tl.load(scores + start + i, mask=i < before, other=0.0), other_place, age)
        ahead += tl.sum(outranks(priority, place, other, other_place) * (i < before).to(tl.int32)[None, :], 1)
    evicted_in, block = tl.zeros([BLOCK_J], tl.int32) + num_tokens, begin
    while (num_open > 0) & (block < num_tokens):
        step = block + lane
        i = candidate_of(first + step - window, first, window, num_columns, SINKS)
        in_segment = step < num_tokens
        other_place = tl.load(places + i, mask=in_segment, other=0)
        other = priority_of(tl.load(scores + i, mask=in_segment, other=0.0), other_place, age)
        higher = outranks(priority, place, other, other_place) * in_segment.to(tl.int32)[None, :]
        is_out = (ahead[:, None] + tl.cumsum(higher, 1) >= limit) & (step[None, :] >= joins[:, None])
        evicted_in = tl.minimum(evicted_in, tl.min(tl.where(is_out, step[None, :], num_tokens), 1))
        ahead += tl.sum(higher, 1)
        num_open = tl.sum((is_live & (evicted_in >= num_tokens)).to(tl.int32), 0)
        block += BLOCK_T
    is_evicted = is_live & (evicted_in < num_tokens)
    time = tl.where(is_evicted, (first + evicted_in).to(tl.float64), float("inf"))
    tl.store(times + segment + j, time, mask=j < num_candidates)
    tl.store(own_losers + evicted_in, j.to(tl.int64), mask=is_evicted)
    step = j - num_columns  # of the new token that is a candidate here
    has_loser = (step >= begin) & (before + step - begin >= limit)
    none = tl.zeros([BLOCK_J], tl.int64) - 1
    tl.store(own_losers + step, none, mask=(step >= 0) & (step < num_tokens) & (has_loser == 0))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=INDICES)
def sources_kernel(
    positions, starts, windows, limits, times, sources, num_columns, SINKS: tl.constexpr, BLOCK_J: tl.constexpr
):
    """Grid (N, G, ceil(J / BLOCK_J)): the candidate that stands in each column after the segment.

    Args:
        positions, starts, times: as in `evictions_kernel`.
        sources: [N, G, J] int64, written; a column that holds nothing, or that no head's place is, keeps its own.
    """
    n, g, num_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    begin_row = tl.load(starts + n)
    num_tokens = (tl.load(starts + n + 1) - begin_row).to(tl.int32)
    first = tl.load(positions + begin_row).to(tl.int32)
    window, limit = tl.load(windows + g).to(tl.int32), tl.load(limits + g).to(tl.int32)
    own_times = times + num_heads * (n * num_columns + begin_row) + g * (num_columns + num_tokens)
    start, last = SINKS + window, first + num_tokens - 1
    before = tl.minimum(limit, tl.maximum(first - start, 0))
    j = tl.program_id(2) * BLOCK_J + tl.arange(0, BLOCK_J)
    token = tl.where(j < SINKS, j, last - (last - (j - SINKS) + window) % window)  # of sinks and of the ring
    is_new = (j < start) & (token >= tl.where(j < SINKS, first, tl.maximum(first, SINKS))) & (token <= last)
    source = tl.where(is_new, num_columns + token - first, j)
    joined = SINKS + j - start  # the token that first took this place among the anchors
    fills = (j >= start + before) & (j < start + limit) & (joined + window <= last)
    source = tl.where(fills, candidate_of(joined, first, window, num_columns, SINKS), source)
    is_anchor = fills | ((j >= start) & (j < start + before))
    time = tl.load(own_times + source, mask=is_anchor, other=float("inf"))
    while tl.min(time, 0) < float("inf"):  # whoever drove it out has its place
        is_out = time < float("inf")
        leaving = tl.where(is_out, time, 0.0).to(tl.int32) - window
        source = tl.where(is_out, candidate_of(leaving, first, window, num_columns, SINKS), source)
        time = tl.load(own_times + source, mask=is_out, other=float("inf"))
    tl.store(sources + (n * num_heads + g) * num_columns + j, source.to(tl.int64), mask=j < num_columns)
