"""Whole segments through a model's blocks with an attention of choice: how training and evaluation run a model."""

import torch
from torch import Tensor

from dijiang_model.batch import PackedBatch
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import AttentionOp
from dijiang_model.ops.layout import Rotary, StepLayout
from dijiang_model.ops.training.attention import NO_STATE


def run_segments(model: DiJiangForCausalLM, token_ids: Tensor, op: AttentionOp, *, offset: int = 0) -> Tensor:
    """Segments of equal length, each from position 0, through the model's blocks with an attention of choice.

    Args:
        token_ids: [N, T] int64 on the model's device.
        offset: see `segments_layout`.

    Returns:
        [N * T, D], what `model.logits` reads; with gradients where parameters ask for them.
    """
    num, length = token_ids.shape
    positions = torch.arange(length, device=token_ids.device).repeat(num)
    layout = segments_layout(model, num, length, offset=offset)
    x = model.embed(token_ids.flatten(), positions)
    for block in model.blocks:
        x = block(x, op=op, layout=layout, state=NO_STATE)
    return model.finish(x)


def segments_layout(model: DiJiangForCausalLM, num: int, length: int, *, offset: int = 0) -> StepLayout:
    """The layout of `num` segments of `length` tokens, each from position 0.

    Args:
        offset: rotates queries and keys as if the segments began there. Softmax over exact tokens and sinks does not
            change, as it sees relative positions only; features of the linear part see the rotation itself, and
            have to be trained on all the positions that they shall serve.
    """
    positions = torch.arange(length, device=model.device).repeat(num)
    none = torch.zeros(num, dtype=torch.int64, device=model.device)
    layout = model.step_layout(PackedBatch(positions, positions, none, (length,) * num, 0, none))
    if offset == 0:
        return layout
    config = model.config
    dtype = layout.rotary.cos.dtype
    rotary = Rotary.at(positions + offset, frequencies=config.frequencies, dtype=dtype)
    moved = layout.rotated(rotary, rotary)
    if config.local_layers is not None:
        local = Rotary.at(positions + offset, frequencies=config.local_frequencies, dtype=dtype)
        moved.local = layout.rotated(local, local)
    return moved
