"""Launches the small kernels around the attention; see `kernels.small`."""

import torch
import triton
from torch import Tensor, nn

from dijiang_model.ops.layout import Rotary, frequencies_on
from dijiang_model.ops.triton.device import OPTIONS, on_device_of
from dijiang_model.ops.triton.kernels.small import angles_kernel, gated_norm_kernel
from dijiang_model.rotary import Frequencies


def gated_norm(attended: Tensor, gate: Tensor, norm: nn.GroupNorm) -> Tensor:
    """The released read-out in one pass, without rounding before the norm.

    Args:
        attended: [T, H, d], raw sums.
        gate: [T, H * d], before its activation.

    Returns:
        [T, H * d] in the gate's dtype.
    """
    num_tokens, width = gate.shape
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    members = width // norm.num_groups
    with on_device_of(gate):
        gated_norm_kernel[(num_tokens,)](
            attended.contiguous(),
            gate.contiguous(),
            norm.weight,
            norm.bias,
            out,
            norm.eps,
            GROUPS=norm.num_groups,
            WIDTH=members,
            BLOCK_GROUPS=triton.next_power_of_2(norm.num_groups),
            BLOCK_WIDTH=triton.next_power_of_2(members),
            num_warps=8 if width > 2048 else 4,
            **OPTIONS,
        )
    return out


def angles(positions: Tensor, *, frequencies: Frequencies, last_sink: int) -> tuple[Rotary, Rotary]:
    """`Rotary.at` of positions [T], and of positions capped to `last_sink`, in one launch; fp32."""
    half = len(frequencies)
    tables = torch.empty((4, len(positions), half), dtype=torch.float32, device=positions.device)
    cos, sin, cos_sink, sin_sink = tables.unbind(0)
    if half > 0 and len(positions) > 0:
        with on_device_of(positions):
            angles_kernel[(len(positions),)](
                positions,
                frequencies_on(frequencies, positions.device),
                cos,
                sin,
                cos_sink,
                sin_sink,
                last_sink,
                HALF=half,
                BLOCK_HALF=triton.next_power_of_2(half),
                num_warps=1,
                **OPTIONS,
            )
    return Rotary(cos, sin, frequencies), Rotary(cos_sink, sin_sink, frequencies)
