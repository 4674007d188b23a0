"""Launches the kernel of decode rows of layers with anchors (`kernels.anchors`); prompts: `anchored_prefill`."""

from functools import lru_cache

import torch
import triton
from torch import Tensor

from dijiang_model.config import AnchorConfig
from dijiang_model.kernel import LinearKernel
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import StepLayout, frequencies_on, sent
from dijiang_model.ops.triton.around import wide_product
from dijiang_model.ops.triton.decode import DecodeBlocks
from dijiang_model.ops.triton.device import OPTIONS
from dijiang_model.ops.triton.kernels.anchors import anchored_decode_kernel


@lru_cache(maxsize=256)
@torch.inference_mode(mode=False)
def head_tables(anchors: AnchorConfig, sinks: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First place, window and most anchors of each head [G] int64, and the age [1] fp64."""
    places, windows = torch.tensor(anchors.places), torch.tensor(anchors.windows)
    ages = torch.tensor([anchors.age], dtype=torch.float64)
    first, limits = places.cumsum(0) - places, places - windows - sinks
    return sent(first, device), sent(windows, device), sent(limits, device), sent(ages, device)


def decode_anchors(
    q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
) -> Tensor:
    """The decode rows of a step, as `decode`, [N, H, d]; `state.token_scores` has the scores of the step's tokens."""
    config, (num_rows, num_heads, head_size) = kernel.attention, q.shape
    anchors = config.anchors
    assert anchors is not None
    scores, states = state.token_scores, _states(state)
    assert scores is not None
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    blocks = DecodeBlocks.of(head_size=head_size, num_features=kernel.num_features, is_int8=True)
    rank, groups = config.features.far_rank, kernel.num_kv_heads
    anchored_decode_kernel[(num_rows, groups)](
        q,
        k,
        v,
        kernel.far_query_low(q, wide_product) if rank > 0 else out,
        scores,
        out,
        torch.empty((num_rows, groups, 2, head_size), dtype=torch.float32, device=q.device),
        layout.decode_slots,
        layout.positions,
        layout.rotary.cos,
        layout.rotary.sin,
        layout.sink_rotary.cos,
        layout.sink_rotary.sin,
        frequencies_on(layout.rotary.frequencies, q.device),
        *head_tables(anchors, config.sinks, q.device),
        kernel.basis,
        kernel.ones if kernel.is_whole_projection else kernel.nodes,
        kernel.zeros if kernel.is_whole_projection else kernel.log_weights,
        kernel.log_decay,
        kernel.far_query_up if rank > 0 else out,
        kernel.mix_bias,
        kernel.mix_weight,
        *states,
        *(stride for x in (q, k, v) for stride in x.stride()[:2]),
        *(states[index].stride(0) for index in (0, 1, 2, 4, 8)),
        config.features.scale,
        R=num_heads // groups,
        D=head_size,
        K=kernel.num_features,
        HALF=layout.rotary.cos.shape[-1],
        ROTATED=config.features.rotated,
        SINKS=config.sinks,
        SPAN=anchors.span,
        RANK=rank,
        EXP=config.features.normalisation == "exp",
        BLOCK_RANK=triton.next_power_of_2(max(rank, 1)),
        BLOCK_C=blocks.channels,
        BLOCK_D=triton.next_power_of_2(head_size),
        BLOCK_K=blocks.features,
        BLOCK_V=blocks.values,
        BLOCK_J=blocks.exact,
        BLOCK_R=triton.next_power_of_2(anchors.num_scores),
        num_warps=blocks.warps,
        **OPTIONS,
    )
    return out


def _states(state: LayerState) -> list[Tensor]:
    """S, z, keys, values, the scales of both, positions, shared scores and the last scores."""
    tensors = (
        *(state.linear_state, state.normaliser, state.near_keys, state.near_values, state.near_key_scales),
        *(state.near_value_scales, state.near_positions, state.near_scores, state.recent_scores),
    )
    present = [tensor for tensor in tensors if tensor is not None]
    assert len(present) == len(tensors), "the state of a layer with anchors has all of its parts"
    return present
