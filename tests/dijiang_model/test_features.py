"""The fast feature maps: the bases, the recorded node sets, and the maps against their naive twins."""

import pytest
import scipy.stats
import torch
from torch import Tensor

from dijiang_model import features, reference
from dijiang_model.config import Basis, FeatureConfig, Normalisation


@pytest.mark.parametrize("size", [1, 2, 3, 16, 64, 128])
def test_bases_are_the_cosine_formulas(size: int) -> None:
    torch.testing.assert_close(features.dct2(size), reference.dct_matrix("dct2", size), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(features.dct4(size), reference.dct_matrix("dct4", size), rtol=1e-12, atol=1e-12)


def test_stacked_bases_keep_their_order() -> None:
    basis = features.basis_matrix(FeatureConfig(bases=("dct4", "dct2")), 8)
    x = torch.randn(8, dtype=torch.float64)
    expected = torch.cat([features.dct4(8) @ x, features.dct2(8) @ x])
    torch.testing.assert_close(x @ basis, expected)


@pytest.mark.parametrize("name", list(features.NODE_SETS))
@pytest.mark.parametrize("num", [1, 2, 64, 255])
def test_node_radii_are_normal_quantiles_of_distinct_points_inside_the_unit_interval(name: str, num: int) -> None:
    points = features.NODE_SETS[name](num)
    assert points.dtype == torch.float64
    assert len(points.unique()) == num
    assert ((points > 0) & (points < 1)).all()
    expected = torch.from_numpy(scipy.stats.norm.ppf(points.numpy()))
    torch.testing.assert_close(features.node_radii(name, num), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num", [1, 2, 64, 127])
def test_signed_sphere_has_one_radius_and_alternating_signs(num: int) -> None:
    radii = features.node_radii(features.SIGNED_SPHERE, num)
    assert radii.tolist() == [1.0 if i % 2 == 0 else -1.0 for i in range(num)]


def test_every_named_node_set_can_be_made() -> None:
    for name in features.NODE_NAMES:
        assert features.node_radii(name, 16).isfinite().all()


def star_discrepancy(points: Tensor) -> float:
    """Of points in [0, 1): the largest gap between the empirical and the uniform distribution function."""
    ordered, ranks = points.sort().values, torch.arange(len(points) + 1) / len(points)
    return float(torch.maximum((ranks[1:] - ordered).max(), (ordered - ranks[:-1]).max()))


@pytest.mark.parametrize("num", [16, 64, 256])
def test_node_sets_have_low_discrepancy(num: int) -> None:
    """Random points would be near 1 / sqrt(num); these are O(log num / num), the midpoints optimal."""
    assert star_discrepancy(features.NODE_SETS["midpoint"](num)) == pytest.approx(1 / (2 * num))
    for name in ("van_der_corput", "kronecker"):
        assert star_discrepancy(features.NODE_SETS[name](num)) < 3 / num


def test_van_der_corput_reverses_the_bits() -> None:
    assert features.NODE_SETS["van_der_corput"](7).tolist() == [1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]


def test_unknown_node_set_is_an_error() -> None:
    with pytest.raises(KeyError):
        features.node_radii("halton", 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("normalisation", ["softmax", "exp"])
@pytest.mark.parametrize("bases", [("dct2",), ("dct4",), ("dct2", "dct4")])
def test_feature_map_equals_its_twin(
    bases: tuple[Basis, ...], normalisation: Normalisation, dtype: torch.dtype
) -> None:
    """fp32: exponents of size 10 carry an error of 10 * 6e-8, which the exponential keeps as a relative one."""
    config = FeatureConfig(bases=bases, normalisation=normalisation, scale=0.7)
    num_features, random = 8 * len(bases), torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, 8, generator=random, dtype=torch.float64)
    nodes, log_weights = torch.randn(2, 3, num_features, generator=random, dtype=torch.float64)
    expected = reference.feature_map(x, config, {"nodes": nodes, "log_weights": log_weights})
    actual = features.feature_map(
        x.to(dtype).unflatten(1, (3, 2)),
        features.basis_matrix(config, 8).to(dtype),
        nodes.to(dtype),
        log_weights.to(dtype),
        config,
    )
    assert actual.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual.flatten(1, 2).double(), expected, rtol=tolerance, atol=1e-12)


def test_softmax_form_does_not_overflow_in_fp32() -> None:
    ones, zeros = torch.ones(1, 4), torch.zeros(1, 4)
    basis = features.basis_matrix(FeatureConfig(), 4).float()
    phi = features.feature_map(torch.full((1, 1, 1, 4), 1e4), basis, ones, zeros, FeatureConfig())
    torch.testing.assert_close(phi.sum(-1), torch.ones(1, 1, 1))
