"""The hybrid's definition against softmax attention, pure linear attention and its own recurrent form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dijiang_model import reference
from dijiang_model.reference.hybrid import HybridInputs


def make_inputs(
    num_tokens: int, *, num_heads: int = 4, num_groups: int = 2, size: int = 6, seed: int = 0, silent: bool = False
) -> HybridInputs:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    return HybridInputs(
        q=normal(num_tokens, num_heads, size),
        q_sink=normal(num_tokens, num_heads, size),
        k=normal(num_tokens, num_groups, size),
        v=normal(num_tokens, num_groups, 5),
        phi_q=normal(num_tokens, num_heads, 7).softmax(dim=-1),
        phi_k=normal(num_tokens, num_groups, 7).softmax(dim=-1),
        beta=torch.zeros(num_tokens, num_heads).double() if silent else normal(num_tokens, num_heads).exp(),
        log_decay=-normal(num_groups).abs() / 4,
    )


def softmax_attention(x: HybridInputs, visible: Tensor) -> Tensor:
    """Causal softmax attention over `visible` [T, T]; every key is scored with `q`."""
    k, v = (t.repeat_interleave(x.q.shape[1] // t.shape[1], dim=1) for t in (x.k, x.v))
    scores = torch.einsum("ihd,jhd->hij", x.q, k) / x.q.shape[-1] ** 0.5
    return torch.einsum("hij,jhv->ihv", scores.masked_fill(~visible, -torch.inf).softmax(dim=-1), v)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(num_tokens=st.integers(1, 30), window=st.integers(1, 12), sinks=st.integers(0, 6), seed=st.integers(0, 2**16))
def test_recurrent_equals_the_definition(num_tokens: int, window: int, sinks: int, seed: int) -> None:
    x = make_inputs(num_tokens, seed=seed)
    y, state = reference.hybrid_recurrent(x, window=window, sinks=sinks)
    torch.testing.assert_close(y, reference.hybrid_parallel(x, window=window, sinks=sinks), rtol=1e-12, atol=1e-12)
    assert len(state.ring) == min(window, max(num_tokens - sinks, 0))
    assert len(state.sinks) == min(sinks, num_tokens)


@pytest.mark.parametrize("cut", [1, 3, 8, 19])
def test_recurrent_may_be_cut_anywhere(cut: int) -> None:
    x = make_inputs(20)
    whole, state = reference.hybrid_recurrent(x, window=4, sinks=2)
    names = [name for name in HybridInputs.__slots__ if name != "log_decay"]
    first = HybridInputs(**{name: getattr(x, name)[:cut] for name in names}, log_decay=x.log_decay)
    second = HybridInputs(**{name: getattr(x, name)[cut:] for name in names}, log_decay=x.log_decay)
    y_first, between = reference.hybrid_recurrent(first, window=4, sinks=2)
    y_second, end = reference.hybrid_recurrent(second, window=4, sinks=2, state=between)
    torch.testing.assert_close(torch.cat([y_first, y_second]), whole, rtol=0, atol=0)
    torch.testing.assert_close(end.linear.s, state.linear.s, rtol=0, atol=0)
    assert [entry[0] for entry in end.ring] == [entry[0] for entry in state.ring] == [16, 17, 18, 19]


@pytest.mark.parametrize("sinks", [0, 3])
def test_window_that_holds_the_whole_text_is_softmax_attention(sinks: int) -> None:
    x = make_inputs(20)
    x = HybridInputs(x.q, x.q, x.k, x.v, x.phi_q, x.phi_k, x.beta, x.log_decay)
    everything = torch.ones(20, 20).tril().bool()
    torch.testing.assert_close(reference.hybrid_parallel(x, window=20, sinks=sinks), softmax_attention(x, everything))


def test_silent_hybrid_is_softmax_over_window_and_sinks() -> None:
    x = make_inputs(30, silent=True)
    x = HybridInputs(x.q, x.q, x.k, x.v, x.phi_q, x.phi_k, x.beta, x.log_decay)
    i, j = torch.arange(30)[:, None], torch.arange(30)
    visible = (j <= i) & ((j < 3) | (j > i - 5))
    torch.testing.assert_close(reference.hybrid_parallel(x, window=5, sinks=3), softmax_attention(x, visible))
    y, _ = reference.hybrid_recurrent(x, window=5, sinks=3)
    torch.testing.assert_close(y, softmax_attention(x, visible))


def test_sinks_are_scored_with_the_capped_query_and_others_are_not() -> None:
    x = make_inputs(12)
    moved = HybridInputs(x.q, x.q_sink + 1, x.k, x.v, x.phi_q, x.phi_k, x.beta, x.log_decay)
    without, with_sinks = (
        [reference.hybrid_parallel(inputs, window=4, sinks=sinks) for inputs in (x, moved)] for sinks in (0, 2)
    )
    torch.testing.assert_close(without[0], without[1], rtol=0, atol=0)
    assert not torch.allclose(with_sinks[0], with_sinks[1])


def test_a_loud_far_part_is_normalised_linear_attention_over_what_left_the_window() -> None:
    """As beta grows the exact weights (at most w) vanish beside it; it has the tokens from sinks to t - w."""
    x = make_inputs(15)
    loud = HybridInputs(x.q, x.q, x.k, x.v, x.phi_q, x.phi_k, x.beta * 1e14, x.log_decay)
    y, _ = reference.hybrid_recurrent(loud, window=3, sinks=2)
    linear = slice(2, 12)
    numerator, denominator, _ = reference.parallel(
        x.phi_q[14:15].expand(10, -1, -1), x.phi_k[linear], x.v[linear], x.log_decay.expand(10, -1)
    )
    torch.testing.assert_close(y[14], numerator[9] / denominator[9][:, None], rtol=1e-10, atol=1e-10)
