"""Feature maps of the frequency domain, from their formulas (paper eq. 11 and 12, and the released code)."""

from collections.abc import Mapping
from math import cos, pi, sqrt

import torch
from torch import Tensor

from dijiang_model.config import FeatureConfig


def dct_matrix(basis: str, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The orthonormal DCT of a basis name, [size, size]; row k is the direction of feature k, so `C @ x` transforms x.

    `dct2`: C[k, n] = a_k cos(pi k (2n + 1) / 2d) with a_0 = sqrt(1/d), else sqrt(2/d): what
    `scipy.fft.dct(eye(d), axis=0, norm="ortho")` returns. `dct4`: sqrt(2/d) cos(pi (2k+1)(2n+1) / 4d).
    """
    rows = []
    for k in range(size):
        if basis == "dct2":
            height = sqrt((1 if k == 0 else 2) / size)
            rows.append([height * cos(pi * k * (2 * n + 1) / (2 * size)) for n in range(size)])
        else:
            assert basis == "dct4", basis
            rows.append([sqrt(2 / size) * cos(pi * (2 * k + 1) * (2 * n + 1) / (4 * size)) for n in range(size)])
    return torch.tensor(rows, dtype=dtype)


def feature_map(x: Tensor, config: FeatureConfig, tensors: Mapping[str, Tensor]) -> Tensor:
    """phi of queries or keys.

    Args:
        x: [T, heads, d]; heads is G (keys) or a multiple H of it (queries; query head h reads the
            features of group h // (H / G)).
        config: the layer's feature map.
        tensors: `nodes` and `log_weights` [G, K], or `projection` [d, K] for basis `matrix`.

    Returns:
        [T, heads, K], dtype of x.
    """
    x = x * config.scale
    if config.bases == ("matrix",):
        exponent = x @ tensors["projection"].to(x)
    else:
        nodes, log_weights = tensors["nodes"].to(x), tensors["log_weights"].to(x)
        directions = torch.cat([dct_matrix(basis, x.shape[-1], x.dtype) for basis in config.bases])
        directions = directions[: config.num(x.shape[-1])]  # [K, d]
        if len(directions) == 0:
            return torch.zeros((*x.shape[:2], 0), dtype=x.dtype)
        exponent = torch.zeros((*x.shape[:2], directions.shape[0]), dtype=x.dtype)
        num_per_group = x.shape[1] // nodes.shape[0]
        for head in range(x.shape[1]):
            group = head // num_per_group
            exponent[:, head] = (x[:, head] @ directions.T) * nodes[group] + log_weights[group]
    if config.normalisation == "exp":
        return exponent.exp()
    grown = (exponent - exponent.amax(dim=-1, keepdim=True)).exp()
    return grown / grown.sum(dim=-1, keepdim=True)
