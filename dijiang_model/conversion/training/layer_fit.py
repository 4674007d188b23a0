"""Stage 1 for small machines: the teacher reads each text once, then every layer learns from the record alone.

A pass of the teacher costs as much as a step of all kernels. Here it is paid once per window of text; the layers
then go over the record several times, one layer after the other, each with an optimiser of its own. The record
holds (2 H + 2 G) d half-precision values per token and layer: 92 KB a token for 30 layers of 9 and 3 heads of 64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from dijiang_model.attention import DiJiangAttention
from dijiang_model.conversion.training.distill import output_weight, random_offset
from dijiang_model.conversion.training.kernel_training import MATRICES, PRIORITIES
from dijiang_model.errors import ConversionError
from dijiang_model.kernel import LinearKernel
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.training.attention import RecordedAttention, SoftmaxAttention
from dijiang_model.segments import run_segments, segments_layout

WARM_UP_STEPS = 8
LAST_RATE = 0.02

Projected = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""q [T, H, d], k and v [T, G, d] in half precision; token scores [T, G] of a layer with anchors."""


@dataclass(slots=True)
class Record:
    """The teacher's attention inputs of one segment after another; an `AttentionOp` that answers as the teacher.

    Attributes:
        layers: by identity of the kernel.
        projected: by layer, then by segment.
    """

    layers: dict[int, int]
    projected: list[list[Projected]] = field(default_factory=list)

    @classmethod
    def of(cls, model: DiJiangForCausalLM) -> "Record":
        layers = {id(attention.linear): layer for layer, attention in enumerate(model.attentions)}
        return cls(layers, [[] for _ in layers])

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
    ) -> Tensor:
        """See `ops.AttentionOp`."""
        self.projected[self.layers[id(kernel)]].append((q.half(), k.half(), v.half(), state.token_scores))
        return SoftmaxAttention()(q, k, v, kernel=kernel, layout=layout, state=state)


@torch.no_grad()
def record(model: DiJiangForCausalLM, segments: Tensor, *, on_segment: Callable[[], None] = lambda: None) -> Record:
    """One pass of the teacher over [N, T] tokens."""
    kept = Record.of(model)
    for segment in segments:
        run_segments(model, segment[None], kept)
        on_segment()
    return kept


def fit_layers(
    model: DiJiangForCausalLM,
    kept: Record,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    first_layer: int = 0,
    on_layer: Callable[[int, float, float], None] = lambda layer, before, after: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Fits the kernels, which must be trainable (`make_trainable`), in place.

    Args:
        epochs: passes over the record.
        first_layer: layers below are left as they are: a layer's fit depends on its own record and seed alone, so
            that a killed run goes on at the layer where it was.
        learning_rate: of vectors; matrices get a tenth.
        seed: of the order of the segments.
        on_layer: called with a layer and the shares of the window's squared error that the hybrid leaves, over the
            first and over the last epoch.
        should_stop: asked before each layer.

    Returns:
        Whether all layers are done.

    Raises:
        ConversionError: a layer without a window, or an error that is no longer finite.
    """
    for layer, attention in enumerate(model.attentions):
        if attention.config.layers[layer].window == 0:
            raise ConversionError(f"layer {layer} has no window; the replayed stage 1 is for hybrids")
        if layer < first_layer:
            continue
        if should_stop():
            return False
        losses = _fit(model, attention, kept.projected[layer], epochs=epochs, rate=learning_rate, seed=seed + layer)
        if not all(map(math.isfinite, losses)):
            raise ConversionError(f"layer {layer}: the error is not finite; try a lower learning rate")
        num = len(kept.projected[layer])
        on_layer(layer, sum(losses[:num]) / num, sum(losses[-num:]) / num)
    return True


def _fit(
    model: DiJiangForCausalLM,
    attention: DiJiangAttention,
    projected: Sequence[Projected],
    *,
    epochs: int,
    rate: float,
    seed: int,
) -> list[float]:
    """The losses, step by step: squared error over that of the window alone."""
    kernel, weight = attention.linear, output_weight(attention).detach()
    length = len(projected[0][0])
    layout = segments_layout(model, 1, length)
    with torch.no_grad():
        dtype = weight.dtype
        segments = [
            RecordedAttention.of(
                *(x.to(dtype) for x in (q, k, v)), kernel=kernel, layout=layout, token_scores=token_scores
            )
            for q, k, v, token_scores in projected
        ]
        errors = [_error(segment.window_answer - segment.target, weight) for segment in segments]
    scale = float(torch.stack(errors).mean())
    optimizer, full_rates = _optimizer(kernel, rate)
    generator = torch.Generator().manual_seed(seed)
    order = [int(i) for _ in range(epochs) for i in torch.randperm(len(segments), generator=generator)]
    losses = []
    for step, index in enumerate(order):
        layout = segments_layout(model, 1, length, offset=random_offset(generator))
        for group, full in zip(optimizer.param_groups, full_rates, strict=True):
            group["lr"] = full * _factor(step, len(order))
        segment = segments[index]
        loss = _error(segment.answer(kernel=kernel, layout=layout) - segment.target, weight) / scale
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _error(difference: Tensor, weight: Tensor) -> Tensor:
    """Squared, after the output projection."""
    return functional.linear(difference.flatten(1), weight).square().sum()


def _optimizer(kernel: LinearKernel, rate: float) -> tuple[torch.optim.Optimizer, list[float]]:
    named: list[tuple[str, nn.Parameter]] = list(kernel.named_parameters())
    named = [(name, parameter) for name, parameter in named if name not in PRIORITIES]
    matrices = [parameter for name, parameter in named if name in MATRICES]
    vectors = [parameter for name, parameter in named if name not in MATRICES]
    groups = [(vectors, rate), (matrices, rate / 10)]
    groups = [(parameters, lr) for parameters, lr in groups if parameters]
    optimizer = torch.optim.Adam([{"params": parameters, "lr": lr} for parameters, lr in groups], betas=(0.9, 0.95))
    return optimizer, [lr for _, lr in groups]


def _factor(step: int, num_steps: int) -> float:
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / num_steps)
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (LAST_RATE + (1 - LAST_RATE) * cosine)
