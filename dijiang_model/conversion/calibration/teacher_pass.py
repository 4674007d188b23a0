"""The softmax teacher read layer by layer over all contexts: one block's weights are in memory at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dijiang_model.attention import DiJiangAttention
from dijiang_model.checkpoints.fingerprint import is_kernel_tensor
from dijiang_model.kernel import LinearKernel
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import PrefillLayout, Rotary, StepLayout
from dijiang_model.ops.residual import Residual
from dijiang_model.ops.training.attention import NO_STATE, SoftmaxAttention

ReadTensor = Callable[[str], Tensor]
"""A tensor of the model by its checkpoint name."""


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What one layer's attention reads in one context.

    Attributes:
        x: [T, D], the attention's input (normed where the family norms before).
        energy: [T], squared norm of what the layer's block reads.
        q: [T, G, R, d] and k, v: [T, G, d]; q and k rotated.
    """

    x: Tensor
    energy: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(slots=True)
class _Recorder:
    """The teacher's attention, which keeps what it reads."""

    seen: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
    ) -> Tensor:
        """See `ops.AttentionOp`."""
        rotated = layout.rotary.apply(q).unflatten(1, (kernel.num_kv_heads, -1))
        self.seen = (rotated, layout.rotary.apply(k), v)
        return SoftmaxAttention()(q, k, v, kernel=kernel, layout=layout, state=state)


def teacher_layers(
    model: DiJiangForCausalLM, read: ReadTensor, contexts: Sequence[Tensor]
) -> Iterator[tuple[DiJiangAttention, Iterator[LayerInputs]]]:
    """Yields each layer's attention and what it reads, context by context; that iterator must be used up.

    Memory: one block's weights, the activations [T, D] of all contexts, and what the caller keeps.

    Args:
        model: built on `meta` in fp32, and left there; weights are read when they are needed, and let go.
        contexts: token ids, [T] int64 each.
    """
    model.requires_grad_(False)
    blocks = [f"{model.paths.layers}.{layer}." for layer in range(model.config.num_layers)]
    outside = (*blocks, f"{model.paths.head}.")
    with _loaded(model, [name for name in model.state_dict() if not name.startswith(outside)], read):
        streams = [model.embed(ids, torch.arange(len(ids))) for ids in contexts]
    layouts = [_layout(model, len(ids)) for ids in contexts]
    for layer, prefix in enumerate(blocks):
        names = [name for name in model.state_dict() if name.startswith(prefix) and not is_kernel_tensor(name)]
        with _loaded(model, names, read):
            block = model.blocks[layer]
            yield cast(DiJiangAttention, block.dijiang), _read_layer(block, streams, layouts)


def _read_layer(block: nn.Module, streams: list[Tensor], layouts: Sequence[StepLayout]) -> Iterator[LayerInputs]:
    """Moves the streams on through a block, in place, and yields what its attention read."""
    inputs: list[Tensor] = []
    hook = cast(nn.Module, block.dijiang).register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        for place, layout in enumerate(layouts):
            recorder, energy = _Recorder(), streams[place].square().sum(1)
            streams[place] = block(Residual(streams[place]), op=recorder, layout=layout, state=NO_STATE).value
            assert recorder.seen is not None
            yield LayerInputs(inputs.pop(), energy, *recorder.seen)
    finally:
        hook.remove()


def _layout(model: DiJiangForCausalLM, length: int) -> StepLayout:
    """One segment of `length` tokens from position 0, on the CPU."""
    config, positions = model.config, torch.arange(length)
    none = torch.zeros(1, dtype=torch.int64)
    rotary = Rotary.at(positions, frequencies=config.frequencies, dtype=model.dtype)
    layout = StepLayout(
        num_decode=0,
        positions=positions,
        decode_slots=none[:0],
        rotary=rotary,
        sink_rotary=rotary,
        prefill=PrefillLayout(positions, none, (length,)),
    )
    if config.local_layers is not None:
        local = Rotary.at(positions, frequencies=config.local_frequencies, dtype=model.dtype)
        layout.local = layout.rotated(local, local)
    return layout


@contextmanager
def _loaded(model: DiJiangForCausalLM, names: Sequence[str], read: ReadTensor) -> Iterator[None]:
    """Gives the model those tensors, in its dtype, and takes them away again."""
    empty = {name: tensor for name, tensor in model.state_dict().items() if name in set(names)}
    tensors = {name: read(name).to(dtype=model.dtype).contiguous() for name in names}
    model.load_state_dict(tensors, strict=False, assign=True)
    try:
        yield
    finally:
        model.load_state_dict(empty, strict=False, assign=True)
