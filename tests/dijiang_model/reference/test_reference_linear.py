"""The naive forms agree with each other and with the formulas they stand for."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dct
from torch import Tensor

from dijiang_model import reference
from dijiang_model.config import Basis, FeatureConfig
from dijiang_model.reference import LinearState

LENGTHS = (1, 2, 63, 64, 65, 130)


def make_inputs(
    num_tokens: int, *, num_heads: int = 4, num_groups: int = 2, seed: int = 0, per_token_decay: bool = False
) -> dict[str, Any]:
    """fp64 features (positive, as the maps give), values and decays; K = 6, V = 5, so that no two axes agree."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    log_decay = -normal(num_tokens if per_token_decay else 1, num_groups).abs() / 8
    return {
        "phi_q": normal(num_tokens, num_heads, 6).exp(),
        "phi_k": normal(num_tokens, num_groups, 6).exp(),
        "v": normal(num_tokens, num_groups, 5),
        "log_decay": log_decay.expand(num_tokens, num_groups),
    }


def make_state(*, num_groups: int = 2, seed: int = 1) -> LinearState:
    random = torch.Generator().manual_seed(seed)
    s = torch.randn(num_groups, 6, 5, generator=random, dtype=torch.float64)
    return LinearState(s, torch.rand(num_groups, 6, generator=random, dtype=torch.float64) + 1)


def assert_same(actual: reference.linear.LinearResult, expected: reference.linear.LinearResult) -> None:
    """fp64: sums of at most 500 positive terms in another order; 1e-12 is a hundred times their rounding."""
    for a, b in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual[2].s, expected[2].s, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual[2].z, expected[2].z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 64])
@pytest.mark.parametrize(("basis", "scipy_type"), [("dct2", 2), ("dct4", 4)])
def test_bases_are_scipys_orthonormal_transforms(basis: str, scipy_type: int, size: int) -> None:
    matrix = reference.dct_matrix(basis, size)
    expected = torch.from_numpy(dct(torch.eye(size).double().numpy(), type=scipy_type, axis=0, norm="ortho"))
    torch.testing.assert_close(matrix, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size).double(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("bases", [("dct2",), ("dct4",), ("dct2", "dct4")])
def test_feature_map_is_the_papers_formula(bases: tuple[Basis, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, generator=random, dtype=torch.float64)
    nodes, log_weights = torch.randn(2, 2, 8 * len(bases), generator=random, dtype=torch.float64)
    tensors = {"nodes": nodes, "log_weights": log_weights}
    config = FeatureConfig(bases=bases, normalisation="exp", scale=0.5)
    phi = reference.feature_map(x, config, tensors)
    stacked = torch.cat([reference.dct_matrix(basis, 8) for basis in bases])
    for head, group in enumerate((0, 0, 1, 1)):  # four query heads share two key-value heads
        weights, radii = log_weights[group].exp().diag(), nodes[group].diag()
        torch.testing.assert_close(phi[1, head], weights @ (radii @ stacked @ (0.5 * x[1, head])).exp())
    normalised = reference.feature_map(x, FeatureConfig(bases=bases, scale=0.5), tensors)
    torch.testing.assert_close(normalised, phi / phi.sum(dim=-1, keepdim=True))


def test_whole_projection_is_the_released_feature_map() -> None:
    x, projection = torch.randn(3, 2, 8).double(), torch.randn(8, 8).double()
    config = FeatureConfig(bases=("matrix",), nodes="checkpoint")
    phi = reference.feature_map(x, config, {"projection": projection})
    torch.testing.assert_close(phi, torch.softmax(x @ projection, dim=-1))


def test_softmax_features_stay_finite_for_huge_inputs() -> None:
    tensors = {"nodes": torch.full((1, 4), 100.0), "log_weights": torch.zeros(1, 4)}
    phi = reference.feature_map(torch.full((1, 1, 4), 1e4), FeatureConfig(), tensors)
    assert phi.isfinite().all()


@pytest.mark.parametrize("per_token_decay", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("num_tokens", [*LENGTHS, 500])
def test_parallel_equals_recurrent(num_tokens: int, with_state: bool, per_token_decay: bool) -> None:
    inputs = make_inputs(num_tokens, per_token_decay=per_token_decay)
    state = make_state() if with_state else None
    assert_same(reference.parallel(**inputs, state=state), reference.recurrent(**inputs, state=state))


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 2, 7, 63, 64, 65, 200])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_chunked_equals_recurrent_for_any_chunk_size(num_tokens: int, chunk_size: int, with_state: bool) -> None:
    inputs = make_inputs(num_tokens, per_token_decay=True)
    state = make_state() if with_state else None
    chunked = reference.chunked(**inputs, chunk_size=chunk_size, state=state)
    assert_same(chunked, reference.recurrent(**inputs, state=state))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(1, 40),
    cut=st.integers(0, 40),
    num_groups=st.integers(1, 3),
    num_per_group=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_a_sequence_may_be_cut_anywhere(
    num_tokens: int, cut: int, num_groups: int, num_per_group: int, seed: int
) -> None:
    inputs = make_inputs(
        num_tokens, num_heads=num_groups * num_per_group, num_groups=num_groups, seed=seed, per_token_decay=True
    )
    whole = reference.recurrent(**inputs)
    cut = min(cut, num_tokens - 1)
    if cut == 0:
        return
    first = reference.chunked(**{name: x[:cut] for name, x in inputs.items()}, chunk_size=5)
    second = reference.parallel(**{name: x[cut:] for name, x in inputs.items()}, state=first[2])
    joined = torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]), second[2]
    assert_same(joined, whole)


def test_static_decay_is_the_masked_matrix_of_the_paper() -> None:
    """o_i = sum_j gamma^(i-j) phi(q_i).phi(k_j) v_j, written with powers; query heads 2 and 3 read group 1."""
    inputs = make_inputs(9)
    numerator, denominator, state = reference.parallel(**inputs)
    phi_q, phi_k, v = inputs["phi_q"][:, 3], inputs["phi_k"][:, 1], inputs["v"][:, 1]
    gamma = inputs["log_decay"][0, 1].exp()
    for i in range(9):
        weights = torch.stack([gamma ** (i - j) * (phi_q[i] @ phi_k[j]) for j in range(i + 1)])
        torch.testing.assert_close(numerator[i, 3], weights @ v[: i + 1])
        torch.testing.assert_close(denominator[i, 3], weights.sum())
    expected = sum(gamma ** (8 - j) * torch.outer(phi_k[j], v[j]) for j in range(9))
    torch.testing.assert_close(state.s[1], expected)


def test_a_decay_of_zero_forgets_all_that_came_before() -> None:
    inputs = make_inputs(5, per_token_decay=True)
    inputs["log_decay"] = inputs["log_decay"].clone()
    inputs["log_decay"][3] = -torch.inf
    numerator, _, state = reference.parallel(**inputs, state=make_state())
    alone, _, state_alone = reference.parallel(**{name: x[3:] for name, x in inputs.items()})
    torch.testing.assert_close(numerator[3:], alone)
    torch.testing.assert_close(state.s, state_alone.s)


def test_group_norm_gate_is_torchs_group_norm_and_silu() -> None:
    attended, gate = torch.randn(5, 3, 16).double(), torch.randn(5, 48).double()
    weight, bias = torch.randn(2, 48).double()
    actual = reference.group_norm_gate(attended, gate, weight=weight, bias=bias, num_groups=16)
    normed = torch.nn.functional.group_norm(attended.flatten(1), 16, weight, bias)
    torch.testing.assert_close(actual, torch.nn.functional.silu(gate) * normed)
