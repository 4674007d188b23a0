"""The released position tables D1 and D2 as a recurrence that never overflows."""

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dijiang_model import reference


def released_log_decay(num_heads: int) -> Tensor:
    """[H] fp64."""
    return (1 - torch.linspace(log(1 / 32), log(1 / 512), num_heads, dtype=torch.float64).exp()).log()


def initial_tables(log_decay: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """D1 and D2 [H, N] fp64 as the released code initialises them: gamma^n and gamma^-n."""
    exponents = log_decay[:, None] * torch.arange(length, dtype=torch.float64)
    return exponents.exp(), (-exponents).exp()


def make_inputs(num_tokens: int, num_heads: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    phi_q, phi_k = torch.randn(2, num_tokens, num_heads, 4, generator=random, dtype=torch.float64).softmax(dim=-1)
    return phi_q, phi_k, torch.randn(num_tokens, num_heads, 3, generator=random, dtype=torch.float64)


def run_as_recurrence(inputs: tuple[Tensor, Tensor, Tensor], read: Tensor, write: Tensor, log_decay: Tensor) -> Tensor:
    """The recurrent form with `position_table_factors`, in the inputs' dtype."""
    phi_q, phi_k, v = inputs
    factors = reference.position_table_factors(read, write, log_decay, num_tokens=v.shape[0])
    log_decays, writes, reads = (factor.to(v.dtype) for factor in factors)
    numerator, _, state = reference.recurrent(phi_q * reads[:, :, None], phi_k * writes[:, :, None], v, log_decays)
    assert state.s.isfinite().all()
    return numerator


def assert_rows_close(actual: Tensor, expected: Tensor, *, tolerance: float) -> None:
    """Per token and head, relative to the row's norm: rows may differ by orders of magnitude."""
    error = (actual.double() - expected).norm(dim=-1)
    assert (error <= tolerance * expected.norm(dim=-1) + 1e-300).all(), float((error / expected.norm(dim=-1)).max())


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 130])
def test_initial_tables_are_the_static_decay(num_tokens: int) -> None:
    log_decay = released_log_decay(3)
    read, write = initial_tables(log_decay, 64)
    factors = reference.position_table_factors(read, write, log_decay, num_tokens=num_tokens)
    torch.testing.assert_close(factors[0][1:], log_decay.expand(num_tokens - 1, -1), rtol=1e-11, atol=1e-13)
    for factor in factors[1:]:
        torch.testing.assert_close(factor, torch.ones_like(factor), rtol=1e-11, atol=1e-13)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tables=st.lists(
        st.tuples(
            st.sampled_from([0.0, 1.0, -1.0, 0.5, -3.0, 1e-6, -1e6]) | st.floats(-2, 2, allow_subnormal=False),
            st.sampled_from([0.0, 1.0, -1.0, 0.25, 7.0, 1e-6, -1e6]) | st.floats(-2, 2, allow_subnormal=False),
        ),
        min_size=1,
        max_size=24,
    ),
    num_beyond=st.integers(0, 9),
    seed=st.integers(0, 2**16),
)
def test_any_table_is_exact_zeros_and_sign_changes_included(
    tables: list[tuple[float, float]], num_beyond: int, seed: int
) -> None:
    read, write = torch.tensor(tables, dtype=torch.float64).T[:, None, :]
    num_tokens, log_decay = read.shape[1] + num_beyond, released_log_decay(1)
    inputs = make_inputs(num_tokens, 1, seed=seed)
    expected = reference.position_table_parallel(*inputs, read_table=read, write_table=write, log_decay=log_decay)
    actual = run_as_recurrence(inputs, read, write, log_decay)
    # A row may cancel; what bounds its rounding is the sum of its terms' sizes.
    absolute = reference.position_table_parallel(
        inputs[0], inputs[1], inputs[2].abs(), read_table=read.abs(), write_table=write.abs(), log_decay=log_decay
    )
    assert ((actual - expected).abs() <= 1e-12 * absolute + 1e-300).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(entries=st.lists(st.sampled_from([0.0, 1.0, -2.0, 1e-30, 1e30, -0.5]), min_size=1, max_size=30))
def test_no_factor_ever_grows_the_state(entries: list[float]) -> None:
    write = torch.tensor([entries], dtype=torch.float64)
    read = torch.ones_like(write)
    log_decays, writes, _ = reference.position_table_factors(read, write, released_log_decay(1), num_tokens=40)
    assert (log_decays <= 0).all()
    assert (writes.abs() <= 1).all()


def test_tables_go_on_with_the_heads_decay_and_their_last_factors() -> None:
    log_decay = released_log_decay(2)
    read, write = initial_tables(log_decay, 20)
    noise = torch.Generator().manual_seed(3)
    read, write = (t * (1 + 0.3 * torch.randn(t.shape, generator=noise, dtype=t.dtype)) for t in (read, write))
    inputs = make_inputs(50, 2)
    expected = reference.position_table_parallel(*inputs, read_table=read, write_table=write, log_decay=log_decay)
    assert_rows_close(run_as_recurrence(inputs, read, write, log_decay), expected, tolerance=1e-12)


@pytest.mark.parametrize("table_length", [2048, 2900])
def test_fp32_recurrence_holds_where_gamma_to_the_minus_m_overflows_fp32(table_length: int) -> None:
    """Past position 2,794 the first head's gamma^-m is no fp32 number any more; the factors are.

    The definition runs in fp64. An fp32 sum that forgets with gamma >= 31/32 has about 32 to 512 terms in
    effect, so its error is a few hundred roundings at most: 1e-5 relative to the row (6e-8 * 200).
    """
    num_tokens, log_decay = 2900, released_log_decay(2)
    assert log_decay[0].neg().mul(2795).exp().float().isinf()
    read, write = initial_tables(log_decay, table_length)
    inputs = make_inputs(num_tokens, 2)
    expected = reference.position_table_parallel(*inputs, read_table=read, write_table=write, log_decay=log_decay)
    assert_rows_close(run_as_recurrence(inputs, read, write, log_decay), expected, tolerance=1e-11)
    in_fp32 = tuple(x.float() for x in inputs)
    actual = run_as_recurrence(in_fp32, read, write, log_decay)  # type: ignore[arg-type]
    assert actual.dtype == torch.float32
    assert_rows_close(actual, expected, tolerance=1e-5)
