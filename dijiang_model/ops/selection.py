"""Which operators a device gets: Triton kernels on CUDA devices that have matrix units for bf16, else torch's."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional

from dijiang_model.ops import AttentionOp
from dijiang_model.ops.layout import Rotary
from dijiang_model.ops.torch_attention import TorchAttention

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
    positions: Tensor, *, dims: int, theta: float, last_sink: int, dtype: torch.dtype
) -> tuple[Rotary, Rotary]:
    """Of positions [T], and of positions capped to `last_sink`; [T, dims / 2] of `dtype` each."""
    if has_kernels(positions.device, dtype):
        from dijiang_model.ops.triton.read_out import angles

        return angles(positions, dims=dims, theta=theta, last_sink=last_sink)
    at, capped = (
        Rotary.at(one, dims=dims, theta=theta, dtype=dtype) for one in (positions, positions.clamp(max=last_sink))
    )
    return at, capped


def gated_norm(attended: Tensor, gate: Tensor, norm: nn.GroupNorm) -> Tensor:
    """The released read-out: raw sums [T, H, d] and a gate [T, H * d] before its activation -> [T, H * d]."""
    needs_gradient = torch.is_grad_enabled() and (attended.requires_grad or gate.requires_grad)
    if has_kernels(gate.device, gate.dtype) and not needs_gradient:
        from dijiang_model.ops.triton import read_out

        return read_out.gated_norm(attended, gate, norm)
    normed: Tensor = norm(attended.flatten(1).to(gate.dtype))
    return functional.silu(gate) * normed
