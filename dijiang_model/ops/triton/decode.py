"""Launches the decode kernel; see `kernels.decode`."""

from dataclasses import dataclass

import triton
from torch import Tensor

from dijiang_model.kernel import LinearKernel
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.triton.kernels.decode import decode_kernel

OPTIONS = {"enable_fp_fusion": True}
"""Multiply-adds, whatever the version's default."""
LARGEST_TILE = 1 << 14
"""Elements of a state tile in registers: 64 of each of 256 threads."""


@dataclass(frozen=True, slots=True)
class DecodeBlocks:
    """How the decode kernel cuts its work; every number a power of two.

    Attributes:
        features, values: rows and columns of a state tile; fewer columns than the head has mean several turns.
        channels: of a vector, multiplied with the basis at a time.
        near: near rows at a time.
        warps: of 32 threads, to a program.
    """

    features: int
    values: int
    channels: int
    near: int
    warps: int

    @classmethod
    def of(cls, *, head_size: int, num_features: int) -> "DecodeBlocks":
        features, head = triton.next_power_of_2(num_features), triton.next_power_of_2(head_size)
        values = min(head, max(16, LARGEST_TILE // features))
        return cls(
            features=features,
            values=values,
            channels=min(head, max(16, 4096 // features)),
            near=max(16, min(64, 4096 // head)),
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
    num_groups, num_features, rank = kernel.num_kv_heads, kernel.num_features, config.features.far_rank
    if blocks is None:
        blocks = DecodeBlocks.of(head_size=head_size, num_features=num_features)
    low = kernel.far_query_low(q) if rank > 0 else out
    absent = out  # stands for tensors that this layer does not have: never read
    near_keys = absent if state.near_keys is None else state.near_keys
    near_values = absent if state.near_values is None else state.near_values
    normaliser = absent if state.normaliser is None else state.normaliser
    has_table, has_window = config.decay == "table", config.window > 0
    decode_kernel[(num_rows, num_groups)](
        q,
        k,
        v,
        low,
        out,
        layout.decode_slots,
        layout.positions,
        layout.rotary.cos,
        layout.rotary.sin,
        layout.sink_rotary.cos,
        layout.sink_rotary.sin,
        *late,
        kernel.basis,
        kernel.ones if kernel.is_whole_projection else kernel.nodes,
        kernel.zeros if kernel.is_whole_projection else kernel.log_weights,
        kernel.log_decay,
        kernel.table_log_decay if has_table else absent,
        kernel.table_write if has_table else absent,
        kernel.table_read if has_table else absent,
        kernel.far_query_up if rank > 0 else absent,
        kernel.mix_bias if has_window else absent,
        kernel.mix_weight if has_window else absent,
        state.linear_state,
        normaliser,
        near_keys,
        near_values,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        state.linear_state.stride(0),
        normaliser.stride(0),
        near_keys.stride(0),
        kernel.table_write.shape[0] if has_table else 0,
        config.features.scale,
        R=num_heads // num_groups,
        D=head_size,
        K=num_features,
        HALF=layout.rotary.cos.shape[-1],
        ROTATED=config.features.rotated,
        WINDOW=config.window,
        SINKS=config.sinks,
        RANK=rank,
        EXP=config.features.normalisation == "exp",
        TABLE=has_table,
        DENOMINATOR=config.read_out == "denominator",
        BLOCK_RANK=triton.next_power_of_2(max(rank, 1)),
        BLOCK_C=blocks.channels,
        BLOCK_D=triton.next_power_of_2(head_size),
        BLOCK_K=blocks.features,
        BLOCK_V=blocks.values,
        BLOCK_J=blocks.near,
        num_warps=blocks.warps,
        **OPTIONS,
    )
