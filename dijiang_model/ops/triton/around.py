"""Launches the kernels around the attention; see `kernels.around`."""

import torch
import triton
from torch import Tensor, nn

from dijiang_model.ops.triton.device import OPTIONS, on_device_of
from dijiang_model.ops.triton.kernels.around import (
    gated_product_kernel,
    grid_scores_kernel,
    residual_norm_kernel,
    two_norms_kernel,
    wide_product_kernel,
)

PRODUCT_BLOCK = 1024


def residual_norm(x: Tensor, delta: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + delta and its norm, in one pass; [T, width] of one dtype each.

    Args:
        norm: an `nn.LayerNorm` over the width, or an RMSNorm with `weight`, `eps` and `offset`.
    """
    x, delta = x.contiguous(), delta.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    weight, bias, eps, offset = _parameters(norm)
    if len(x) > 0:
        with on_device_of(x):
            residual_norm_kernel[(len(x),)](x, delta, weight, bias, total, normed, eps, offset, **_kind(x, norm))
    return total, normed


def two_norms(x: Tensor, first: nn.Module, second: nn.Module) -> tuple[Tensor, Tensor]:
    """Two norms of the same kind of x [T, width], which is read once."""
    x = x.contiguous()
    normed = torch.empty_like(x), torch.empty_like(x)
    weight_a, bias_a, eps_a, offset_a = _parameters(first)
    weight_b, bias_b, eps_b, offset_b = _parameters(second)
    if len(x) > 0:
        with on_device_of(x):
            two_norms_kernel[(len(x),)](
                x, weight_a, bias_a, weight_b, bias_b, *normed, eps_a, eps_b, offset_a, offset_b, **_kind(x, first)
            )
    return normed


def gated_product(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up in one pass, [T, width] each; rows may lie apart, as those of one product of both do."""
    gate, up = (one if one.stride(-1) == 1 else one.contiguous() for one in (gate, up))
    (num_rows, width), out = gate.shape, torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if num_rows > 0:
        with on_device_of(gate):
            gated_product_kernel[(num_rows, triton.cdiv(width, PRODUCT_BLOCK))](
                *(gate, up, out, width, gate.stride(0), up.stride(0)), BLOCK=PRODUCT_BLOCK, num_warps=4, **OPTIONS
            )
    return out


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, C] times a weight [R, C] of few rows, in the weight's dtype: [T, R]; x is widened on the way."""
    (num_rows, width), out = x.shape, torch.empty(len(x), len(weight), dtype=weight.dtype, device=x.device)
    if num_rows > 0:
        with on_device_of(x):
            wide_product_kernel[(num_rows, len(weight))](
                *(x, weight, out, x.stride(0), width), BLOCK=PRODUCT_BLOCK, num_warps=4, **OPTIONS
            )
    return out


def grid_scores(x: Tensor, weight: Tensor, bias: Tensor, *, grid: float) -> Tensor:
    """x [T, D] weight^T [G, D] + bias [G] to the nearest multiples of `grid`: [T, G] fp32; x is widened on the way."""
    (num_rows, width), out = x.shape, torch.empty(len(x), len(weight), dtype=torch.float32, device=x.device)
    if num_rows > 0:
        with on_device_of(x):
            grid_scores_kernel[(num_rows, len(weight))](
                *(x, weight, bias, out, x.stride(0), width, grid, 1 / grid), BLOCK=PRODUCT_BLOCK, num_warps=4, **OPTIONS
            )
    return out


def _parameters(norm: nn.Module) -> tuple[Tensor, Tensor, float, float]:
    """Weight, bias (the weight stands for none: never read), epsilon, what is added to the weight."""
    weight, bias, eps = norm.weight, getattr(norm, "bias", None), norm.eps
    assert isinstance(weight, Tensor)
    assert isinstance(eps, float)
    return weight, bias if isinstance(bias, Tensor) else weight, eps, float(getattr(norm, "offset", 0.0))


def _kind(x: Tensor, norm: nn.Module) -> dict[str, int]:
    width = x.shape[1]
    return {
        "WIDTH": width,
        "BLOCK": triton.next_power_of_2(width),
        "RMS": not isinstance(norm, nn.LayerNorm),
        "HAS_BIAS": getattr(norm, "bias", None) is not None,
        "num_warps": 8 if width > 2048 else 4,
        **OPTIONS,
    }
