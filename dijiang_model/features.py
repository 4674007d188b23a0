"""The frequency-domain feature map: phi(x) = D * exp(T C x) and its self-normalised form.

C is a fixed orthonormal discrete cosine transform, T the diagonal of radii taken from the inverse CDF
at a recorded low-discrepancy point set, D positive weights (paper eq. 11 and 12; Theorem 3.2 and 3.3).
The released code normalises over the features, `softmax(T C x + log D)`, which stands in for the
`exp(-|x|^2 / 2)` factor of positive random features (paper eq. 5).
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dijiang_model.config import Basis, FeatureConfig


def dct2(size: int) -> Tensor:
    """Orthonormal DCT-II, [size, size] fp64; row k is the k-th cosine: `dct2(d) @ x` transforms x."""
    n = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (n[None, :] + 0.5) * n[:, None]) * math.sqrt(2.0 / size)
    matrix[0] = math.sqrt(1.0 / size)
    return matrix


def dct4(size: int) -> Tensor:
    """Orthonormal DCT-IV, [size, size] fp64; symmetric: other boundary conditions, other directions."""
    n = torch.arange(size, dtype=torch.float64) + 0.5
    return torch.cos(math.pi / size * n[None, :] * n[:, None]) * math.sqrt(2.0 / size)


_TRANSFORMS: Mapping[Basis, Callable[[int], Tensor]] = {"dct2": dct2, "dct4": dct4}


def basis_matrix(features: FeatureConfig, head_size: int) -> Tensor:
    """C transposed, [d, K] fp64, so that `x @ basis` is C x; stacked when there are several bases, and then cut."""
    whole = torch.cat([_TRANSFORMS[basis](head_size).T for basis in features.bases], dim=1)
    return whole[:, : features.num(head_size)].contiguous()


def _midpoint(num: int) -> Tensor:
    """(i + 1/2) / num: the one-dimensional set of least star discrepancy, 1 / (2 num)."""
    return (torch.arange(num, dtype=torch.float64) + 0.5) / num


def _van_der_corput(num: int) -> Tensor:
    """Base-2 radical inverse of 1 ... num: extensible, neighbours far apart."""
    return torch.tensor([_radical_inverse(i) for i in range(1, num + 1)], dtype=torch.float64)


def _radical_inverse(index: int) -> float:
    value, weight = 0.0, 0.5
    while index > 0:
        value += weight * (index & 1)
        index >>= 1
        weight /= 2
    return value


def _kronecker(num: int) -> Tensor:
    """Multiples of the golden ratio modulo 1."""
    return torch.remainder(torch.arange(1, num + 1, dtype=torch.float64) * ((math.sqrt(5.0) - 1) / 2), 1.0)


NODE_SETS: Mapping[str, Callable[[int], Tensor]] = {
    "midpoint": _midpoint,
    "van_der_corput": _van_der_corput,
    "kronecker": _kronecker,
}
"""Recorded low-discrepancy sets in (0, 1); the name goes into the model's config."""


SIGNED_SPHERE = "signed_sphere"
"""Equal radii with alternating signs; see `node_radii`."""
NODE_NAMES = (*NODE_SETS, SIGNED_SPHERE)
"""Every set of nodes that a config may name."""


def node_radii(name: str, num: int) -> Tensor:
    """T: the inverse CDF at a recorded set, [num] fp64, finite.

    For a key of `NODE_SETS` it is the standard normal one. `signed_sphere` takes the radii that Theorem 3.2
    asks for, those of a standard normal vector in d dimensions: relative to their size their distribution is so
    narrow that one value serves every node, and that belongs to the temperature (`FeatureConfig.scale`). Here it
    is 1; neighbouring directions have opposite signs.

    Args:
        name: one of `NODE_NAMES`.
        num: number of nodes, >= 1.

    Raises:
        KeyError: no such set.
    """
    if name == SIGNED_SPHERE:
        return torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(num)[:num]
    radii = torch.special.ndtri(NODE_SETS[name](num))
    return torch.where(torch.isfinite(radii), radii, torch.zeros_like(radii))


def feature_map(x: Tensor, basis: Tensor, nodes: Tensor, log_weights: Tensor, features: FeatureConfig) -> Tensor:
    """phi(x), in x's dtype.

    Args:
        x: [..., G, R, d] rotated queries (R to a key-value head) or keys (R = 1).
        basis: [d, K]; C transposed, or the checkpoint's whole projection.
        nodes: [G, K] radii T (ones for a whole projection).
        log_weights: [G, K] log D.
        features: scale and normalisation.

    Returns:
        [..., G, R, K], positive. The `exp` form overflows where |T C x| passes the dtype's range
        (88 in fp32); the `softmax` form never does.
    """
    logits = (x @ basis) * (nodes * features.scale)[:, None, :] + log_weights[:, None, :]
    if features.normalisation == "softmax":
        return torch.softmax(logits, dim=-1)
    return torch.exp(logits)
