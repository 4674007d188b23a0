"""Which operators a device gets: Triton kernels on CUDA devices that have matrix units for bf16, else torch's."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional

from dijiang_model.ops import AttentionOp
from dijiang_model.ops.drawing import Draws
from dijiang_model.ops.layout import Rotary
from dijiang_model.ops.quantized import QuantizedMatrix
from dijiang_model.ops.torch import drawing as torch_drawing
from dijiang_model.ops.torch.attention import TorchAttention
from dijiang_model.rotary import Frequencies

_LEAST_CAPABILITY = (8, 0)


@cache
def attention_for(device: torch.device, dtype: torch.dtype) -> AttentionOp:
    """The attention operator of models of this dtype on this device; always the same object."""
    if not has_kernels(device, dtype):
        return TorchAttention()
    from dijiang_model.ops.triton import TritonAttention  # needs triton, and a CUDA device to be of use

    return TritonAttention()


@cache
def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels serve models of this dtype on this device; fp64 is for tests, and for torch."""
    return (
        device.type == "cuda"
        and dtype != torch.float64
        and find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    )


def step_angles(
    positions: Tensor, *, frequencies: Frequencies, last_sink: int, dtype: torch.dtype
) -> tuple[Rotary, Rotary]:
    """Of positions [T], and of positions capped to `last_sink`; [T, rotary_dims / 2] of `dtype` each."""
    if has_kernels(positions.device, dtype):
        from dijiang_model.ops.triton.read_out import angles

        return angles(positions, frequencies=frequencies, last_sink=last_sink)
    at, capped = (
        Rotary.at(one, frequencies=frequencies, dtype=dtype) for one in (positions, positions.clamp(max=last_sink))
    )
    return at, capped


def gated_norm(attended: Tensor, gate: Tensor, norm: nn.GroupNorm) -> Tensor:
    """The released read-out: raw sums [T, H, d] and a gate [T, H * d] before its activation -> [T, H * d]."""
    if _is_fused(gate, norm=norm) and not (torch.is_grad_enabled() and attended.requires_grad):
        from dijiang_model.ops.triton import read_out

        return read_out.gated_norm(attended, gate, norm)
    normed: Tensor = norm(attended.flatten(1).to(gate.dtype))
    return functional.silu(gate) * normed


def residual_norm(x: Tensor, delta: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + delta and the norm of that sum; [T, width] each.

    Args:
        norm: an `nn.LayerNorm` or a family's RMSNorm.
    """
    if _is_fused(x, delta, norm=norm):
        from dijiang_model.ops.triton import around

        return around.residual_norm(x, delta, norm)
    total = x + delta
    return total, norm(total)


def two_norms(x: Tensor, first: nn.Module, second: nn.Module) -> tuple[Tensor, Tensor]:
    """Two norms of the same kind of x [T, width]."""
    if _is_fused(x, norm=first):
        from dijiang_model.ops.triton import around

        return around.two_norms(x, first, second)
    return first(x), second(x)


def gated_product(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) * up; equal shapes. On a GPU in one pass where the activation is SiLU."""
    if activation is functional.silu and _is_fused(gate, up):
        from dijiang_model.ops.triton import around

        return around.gated_product(gate, up)
    return activation(gate) * up


def grid_scores(x: Tensor, weight: Tensor, bias: Tensor, *, grid: float) -> Tensor:
    """s_g = a_g . x + b_g to the nearest multiple of `grid`, in weight's dtype: the scores [T, G] of tokens x [T, D].

    Args:
        weight, bias: [G, D] and [G].
    """
    if _is_fused(x) and weight.dtype == torch.float32:
        from dijiang_model.ops.triton import around

        return around.grid_scores(x, weight, bias, grid=grid)
    return (functional.linear(x.to(weight.dtype), weight, bias) / grid).round() * grid


def quantized_product(
    x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None, *, widened: Callable[[torch.dtype], Tensor]
) -> Tensor:
    """x W^T + bias, [..., columns] -> [..., outputs] in x's dtype.

    Args:
        widened: W in a dtype, where no kernel reads its codes.
    """
    if _is_fused(x):
        from dijiang_model.ops.triton import quantized

        return quantized.product(x, matrix, bias)
    return functional.linear(x, widened(x.dtype), bias)


def quantized_rows(ids: Tensor, matrix: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """Rows [...] int64 of an int8 matrix -> [..., columns] of `dtype`."""
    if has_kernels(ids.device, dtype):
        from dijiang_model.ops.triton import quantized

        return quantized.looked_up(ids, matrix, dtype)
    return matrix.codes[ids].to(dtype) * matrix.scales[ids].to(dtype)[..., None]


def drawn_tokens(logits: Tensor, draws: Draws) -> Tensor:
    """A token for each row of logits [M, vocab] fp32, by inverse CDF over what the filters leave; [M] int64.

    -inf: not this token. Of a row of NaN the last one.
    """
    if _are_drawn_by_a_kernel(logits, draws):
        from dijiang_model.ops.triton import drawing

        return drawing.drawn_tokens(logits, draws)
    return torch_drawing.drawn_tokens(logits, draws)


def chosen_tokens(logits: Tensor, draws: Draws, *, is_greedy: bool) -> Tensor:
    """`drawn_tokens` of what a model says as it is: [M] int64, one launch where a kernel does it.

    The first of the most likely tokens where the temperature is 0; `NOT_FINITE` of `native.choose` where not all
    logits are finite.

    Args:
        is_greedy: the temperature of every row is 0.
    """
    if _are_drawn_by_a_kernel(logits, draws):
        from dijiang_model.ops.triton import drawing

        return drawing.drawn_tokens(logits, draws, is_checked=True)
    return torch_drawing.chosen_tokens(logits, draws, is_greedy=is_greedy)


def _are_drawn_by_a_kernel(logits: Tensor, draws: Draws) -> bool:
    return draws.typical_p is None and logits.dtype == torch.float32 and has_kernels(logits.device, logits.dtype)


def _is_fused(*inputs: Tensor, norm: nn.Module | None = None) -> bool:
    """Whether kernels do this: they know no gradients and no mixed dtypes (autocast)."""
    dtype = inputs[0].dtype
    if not has_kernels(inputs[0].device, dtype) or any(one.dtype != dtype for one in inputs):
        return False
    parameters = () if norm is None else tuple(norm.parameters())
    return not (torch.is_grad_enabled() and any(one.requires_grad for one in (*inputs, *parameters)))
