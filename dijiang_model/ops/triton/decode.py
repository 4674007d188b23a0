"""Launches the decode kernel; see `kernels.decode`."""

from dataclasses import dataclass

import triton
from torch import Tensor

from dijiang_model.kernel import LinearKernel
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.triton.around import wide_product
from dijiang_model.ops.triton.device import OPTIONS
from dijiang_model.ops.triton.kernels.decode import decode_kernel

LARGEST_TILE = 1 << 14
"""Elements of a state tile in registers: 64 of each of 256 threads."""


@dataclass(frozen=True, slots=True)
class DecodeBlocks:
    """How the decode kernel cuts its work; every number a power of two.

    Attributes:
        features, values: rows and columns of a state tile; fewer columns than the head has mean several turns.
        channels: of a vector, multiplied with the basis at a time.
        exact: exact rows at a time.
        warps: of 32 threads, to a program.
    """

    features: int
    values: int
    channels: int
    exact: int
    warps: int

    @classmethod
    def of(cls, *, head_size: int, num_features: int, is_int8: bool = False) -> "DecodeBlocks":
        """For a layer's shape; `is_int8`: exact rows are int8, which take registers for their way to fp32."""
        features, head = triton.next_power_of_2(num_features), triton.next_power_of_2(head_size)
        values = min(head, max(16, LARGEST_TILE // features))
        return cls(
            features=features,
            values=values,
            channels=min(head, max(16, 4096 // features)),
            exact=max(16, min(64, (2048 if is_int8 else 4096) // head)),
            warps=8 if features * values > 1 << 12 else 4,
        )


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: LinearKernel,
    layout: StepLayout,
    state: LayerState,
    out: Tensor,
    late: tuple[Tensor, Tensor],
    blocks: DecodeBlocks | None = None,
) -> None:
    """The decode rows of a step: see `ops.AttentionOp`.

    Args:
        q, k, v: of the decode rows alone; the last dimension contiguous.
        late: cosines and sines of as many positions as the window has; read where features see no rotation.
        out: [N, H, d], contiguous; written.
        blocks: None: `DecodeBlocks.of` the shape.
    """
    config, (num_rows, num_heads, head_size) = kernel.attention, q.shape
    states = _states(state, absent=out)
    if blocks is None:
        is_int8 = state.near_key_scales is not None
        blocks = DecodeBlocks.of(head_size=head_size, num_features=kernel.num_features, is_int8=is_int8)
    rank = config.features.far_rank
    decode_kernel[(num_rows, kernel.num_kv_heads)](
        q,
        k,
        v,
        kernel.far_query_low(q, wide_product) if rank > 0 else out,
        out,
        layout.decode_slots,
        layout.positions,
        layout.rotary.cos,
        layout.rotary.sin,
        layout.sink_rotary.cos,
        layout.sink_rotary.sin,
        *late,
        *_parameters(kernel, absent=out),
        *states,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *(states[n].stride(0) for n in (0, 1, 2, 4)),
        kernel.table_write.shape[0] if config.decay == "table" else 0,
        config.features.scale,
        R=num_heads // kernel.num_kv_heads,
        D=head_size,
        HALF=layout.rotary.cos.shape[-1],
        BLOCK_RANK=triton.next_power_of_2(max(rank, 1)),
        BLOCK_C=blocks.channels,
        BLOCK_D=triton.next_power_of_2(head_size),
        BLOCK_K=blocks.features,
        BLOCK_V=blocks.values,
        BLOCK_J=blocks.exact,
        num_warps=blocks.warps,
        **_kind(kernel),
        **OPTIONS,
    )


def _parameters(kernel: LinearKernel, *, absent: Tensor) -> tuple[Tensor, ...]:
    """Basis, nodes, log weights, decay, three tables, far queries' second factor, bias and weight of the mixing weight.

    `absent` stands for those that this layer does not have: never read.
    """
    config = kernel.attention
    has_table, has_window = config.decay == "table", config.window > 0
    return (
        kernel.basis,
        kernel.ones if kernel.is_whole_projection else kernel.nodes,
        kernel.zeros if kernel.is_whole_projection else kernel.log_weights,
        kernel.log_decay,
        kernel.table_log_decay if has_table else absent,
        kernel.table_write if has_table else absent,
        kernel.table_read if has_table else absent,
        kernel.far_query_up if config.features.far_rank > 0 else absent,
        kernel.mix_bias if has_window else absent,
        kernel.mix_weight if has_window else absent,
    )


def _states(state: LayerState, *, absent: Tensor) -> tuple[Tensor, ...]:
    """S, z, exact keys and exact values, the scales of both."""
    return (
        state.linear_state,
        absent if state.normaliser is None else state.normaliser,
        absent if state.near_keys is None else state.near_keys,
        absent if state.near_values is None else state.near_values,
        absent if state.near_key_scales is None else state.near_key_scales,
        absent if state.near_value_scales is None else state.near_value_scales,
    )


def _kind(kernel: LinearKernel) -> dict[str, int]:
    """What the kernel is compiled for."""
    config = kernel.attention
    return {
        "K": kernel.num_features,
        "ROTATED": config.features.rotated,
        "WINDOW": config.window,
        "SINKS": config.sinks,
        "RANK": config.features.far_rank,
        "EXP": config.features.normalisation == "exp",
        "TABLE": config.decay == "table",
        "DENOMINATOR": config.read_out == "denominator",
    }
