"""The anchored state's definition against softmax attention, the plain window, and its recurrent and chunked forms."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dijiang_model.reference.anchors import (
    AnchoredState,
    AnchorRules,
    anchored_chunk,
    anchored_parallel,
    anchored_recurrent,
    eviction_times,
    token_scores,
)
from dijiang_model.reference.hybrid import hybrid_recurrent
from tests.dijiang_model.reference.test_reference_hybrid import make_inputs, softmax_attention

RULES = AnchorRules(sinks=2, windows=(4, 3), anchors=(3, 5), age=5e-4, span=3)


def make_scores(num_tokens: int, *, seed: int = 0, levels: int = 6) -> Tensor:
    """[T, 2] multiples of 1/4 of so few values that many are equal."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (num_tokens, 2), generator=random).double() / 4


def assert_same(actual: AnchoredState, expected: AnchoredState, *, tolerance: float) -> None:
    """The same sets and scores, and sums within a tolerance."""
    assert actual.num_seen == expected.num_seen
    for one, other in zip(actual.heads, expected.heads, strict=True):
        for part in ("sinks", "window", "anchors"):
            sets = [{p.position: p.score for p in getattr(head, part)} for head in (one, other)]
            assert sets[0] == sets[1], part
        assert one.recent == other.recent
        torch.testing.assert_close(one.linear.s, other.linear.s, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(one.linear.z, other.linear.z, rtol=tolerance, atol=tolerance)


@st.composite
def any_rules(draw: st.DrawFn) -> AnchorRules:
    span = draw(st.integers(0, 3))
    windows = tuple(draw(st.integers(max(1, span), 7)) for _ in range(2))
    anchors = tuple(draw(st.integers(0, 6)) for _ in range(2))
    return AnchorRules(draw(st.integers(0, 4)), windows, anchors, draw(st.sampled_from([0.0, 5e-4, 0.1, 1.0])), span)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rules=any_rules(), num_tokens=st.integers(1, 32), seed=st.integers(0, 2**16))
def test_recurrent_equals_the_definition(rules: AnchorRules, num_tokens: int, seed: int) -> None:
    x, scores = make_inputs(num_tokens, seed=seed), make_scores(num_tokens, seed=seed)
    y, state = anchored_recurrent(x, scores, rules)
    torch.testing.assert_close(y, anchored_parallel(x, scores, rules), rtol=1e-12, atol=1e-12)
    for g, head in enumerate(state.heads):
        assert len(head.window) == min(rules.windows[g], max(num_tokens - rules.sinks, 0))
        assert len(head.anchors) == min(rules.anchors[g], max(num_tokens - rules.sinks - rules.windows[g], 0))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rules=any_rules(), cuts=st.lists(st.integers(1, 32), max_size=4), seed=st.integers(0, 2**16))
def test_any_chunking_gives_the_same_sets_and_outputs(rules: AnchorRules, cuts: list[int], seed: int) -> None:
    x, scores = make_inputs(33, seed=seed), make_scores(33, seed=seed)
    whole, end = anchored_recurrent(x, scores, rules)
    bounds = [0, *sorted(set(cuts)), 33]
    state, parts = None, []
    for i, (start, stop) in enumerate(pairwise(bounds)):
        form = anchored_recurrent if (seed + i) % 3 == 0 else anchored_chunk
        y, state = form(x.rows(start, stop), scores[start:stop], rules, state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-11, atol=1e-11)
    assert state is not None
    assert_same(state, end, tolerance=1e-11)


@pytest.mark.parametrize("sinks", [0, 3])
def test_scores_of_zero_that_age_are_the_plain_window(sinks: int) -> None:
    x = make_inputs(40)
    rules = AnchorRules(sinks, windows=(4, 4), anchors=(5, 5), age=1.0, span=3)
    y, state = anchored_recurrent(x, torch.zeros(40, 2).double(), rules)
    expected, plain = hybrid_recurrent(x, window=9, sinks=sinks)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for g, head in enumerate(state.heads):
        torch.testing.assert_close(head.linear.s, plain.linear.s[g], rtol=1e-12, atol=1e-12)
        assert [place.position for place in (*head.anchors, *head.window)] == [entry[0] for entry in plain.ring]


def test_no_anchors_are_the_plain_window() -> None:
    x = make_inputs(30)
    rules = AnchorRules(2, windows=(5, 5), anchors=(0, 0), age=0.0, span=3)
    y, _ = anchored_recurrent(x, make_scores(30), rules)
    torch.testing.assert_close(y, hybrid_recurrent(x, window=5, sinks=2)[0], rtol=1e-12, atol=1e-12)


def test_places_for_the_whole_text_are_softmax_attention() -> None:
    x = make_inputs(25)
    x = replace(x, q_sink=x.q)
    rules = AnchorRules(2, windows=(4, 6), anchors=(30, 30), age=0.0, span=3)
    everything = torch.ones(25, 25).tril().bool()
    torch.testing.assert_close(anchored_parallel(x, make_scores(25), rules), softmax_attention(x, everything))


def test_a_disabled_linear_part_leaves_softmax_over_what_is_held() -> None:
    x = replace(make_inputs(30, silent=True), q_sink=make_inputs(30, silent=True).q)
    scores = make_scores(30)
    y, _ = anchored_recurrent(x, scores, RULES)
    t = torch.arange(30)
    for g in range(2):
        visible = (t <= t[:, None]) & (t[:, None] < torch.tensor(eviction_times(scores[:, g], RULES, g)))
        own = slice(2 * g, 2 * g + 2)
        torch.testing.assert_close(y[:, own], softmax_attention(x, visible)[:, own])


def test_drafts_that_are_given_up_leave_no_trace() -> None:
    x, scores = make_inputs(30), make_scores(30)
    _, before = anchored_recurrent(x.rows(0, 20), scores[:20], RULES)
    drafts = replace(x.rows(20, 28), k=x.rows(20, 28).k + 1, v=x.rows(20, 28).v - 1)
    anchored_recurrent(drafts, scores[20:28] + 9, RULES, state=before)
    after, state = anchored_recurrent(x.rows(20, 30), scores[20:], RULES, state=before)
    whole, end = anchored_recurrent(x, scores, RULES)
    assert torch.equal(after, whole[20:])
    assert_same(state, end, tolerance=0)


def test_of_equal_priorities_the_older_token_is_evicted() -> None:
    rules = AnchorRules(0, windows=(1, 1), anchors=(2, 2), age=0.0, span=0)
    assert eviction_times(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]), rules, 0)[:4] == [3, torch.inf, torch.inf, 4]


def test_a_fact_is_a_span_its_neighbours_stay_with_it() -> None:
    scores = torch.zeros(60, 2).double()
    scores[20] = 5.0
    rules = AnchorRules(2, windows=(5, 5), anchors=(7, 7), age=5e-4, span=3)
    times = eviction_times(scores[:, 0], rules, 0)
    assert all(times[j] == torch.inf for j in range(17, 24))


def test_scores_lie_on_the_grid() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 8).double(), torch.randn(2, 8).double()
    scores = token_scores(x, weight, torch.tensor([0.0, -3.0]).double(), grid=1 / 64)
    assert torch.equal((scores * 64).round(), scores * 64)
    exact = x @ weight.T + torch.tensor([0.0, -3.0])
    assert (scores - exact).abs().max() <= 1 / 128
