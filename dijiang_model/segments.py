"""Whole segments through a model's blocks with an attention of choice: how training and evaluation run a model."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dijiang_model.batch import PackedBatch
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import AttentionOp
from dijiang_model.ops.layout import Rotary, StepLayout
from dijiang_model.ops.residual import Residual
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
    return _run(model, token_ids.flatten(), segments_layout(model, num, length, offset=offset), op, _called)


def run_texts(
    model: DiJiangForCausalLM, token_ids: Tensor, lengths: Sequence[int], op: AttentionOp, *, call: "Call | None" = None
) -> Tensor:
    """The same of segments of different lengths.

    Args:
        token_ids: [T] int64 on the model's device, packed.
        lengths: of the segments, >= 1; they sum to T.
        call: runs a block; None: calls it.

    Returns:
        [T, D], as `run_segments`.
    """
    return _run(model, token_ids, _layout(model, lengths), op, _called if call is None else call)


Call = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
"""Applies a block to [T, hidden]; checkpointing of activations is one that does so twice."""


def _called(block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return block(x)


def _run(model: DiJiangForCausalLM, token_ids: Tensor, layout: StepLayout, op: AttentionOp, call: Call) -> Tensor:
    x = model.embed(token_ids, layout.positions)
    for block in model.blocks:
        x = call(partial(_advance, block, op, layout), x)
    return model.finish(Residual(x))


def _advance(block: nn.Module, op: AttentionOp, layout: StepLayout, x: Tensor) -> Tensor:
    moved: Residual = block(Residual(x), op=op, layout=layout, state=NO_STATE)
    return moved.value


def segments_layout(model: DiJiangForCausalLM, num: int, length: int, *, offset: int = 0) -> StepLayout:
    """The layout of `num` segments of `length` tokens, each from position 0.

    Args:
        offset: rotates queries and keys as if the segments began there. Softmax over exact tokens and sinks does not
            change, as it sees relative positions only; features of the linear part see the rotation itself, and
            have to be trained on all the positions that they shall serve.
    """
    layout = _layout(model, (length,) * num)
    if offset == 0:
        return layout
    config, positions = model.config, layout.positions
    dtype = layout.rotary.cos.dtype
    rotary = Rotary.at(positions + offset, frequencies=config.frequencies, dtype=dtype)
    moved = layout.rotated(rotary, rotary)
    if config.local_layers is not None:
        local = Rotary.at(positions + offset, frequencies=config.local_frequencies, dtype=dtype)
        moved.local = layout.rotated(local, local)
    return moved


def _layout(model: DiJiangForCausalLM, lengths: Sequence[int]) -> StepLayout:
    positions = torch.cat([torch.arange(length, device=model.device) for length in lengths])
    none = torch.zeros(len(lengths), dtype=torch.int64, device=model.device)
    return model.step_layout(PackedBatch(positions, positions, none, tuple(lengths), 0, none))
