"""One pass of the teacher: which tokens will be needed, by ridge regression, and what few places cost each head."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dijiang_model.config import AnchorConfig
from dijiang_model.conversion.calibration.contexts import Context
from dijiang_model.conversion.calibration.far_attention import far_attention, recall_attention
from dijiang_model.conversion.calibration.head_losses import answer_losses, priorities
from dijiang_model.conversion.calibration.ridge import RidgeSums, total
from dijiang_model.conversion.calibration.teacher_pass import LayerInputs, ReadTensor, teacher_layers
from dijiang_model.conversion.training.distill import output_weight
from dijiang_model.model import DiJiangForCausalLM

SMALLEST_ATTENTION = 1e-6
"""Attention below it counts as it: logarithms of next to nothing say nothing."""
TOKENS_PER_QUERY = 64
"""Targets are not learned from where fewer queries look at a token than one for so many tokens of the context."""
NUM_HELD_OUT = 4
"""Contexts on which a predictor fitted to the others is judged; what is used in the end is fitted to all."""
NUM_LOSS_CONTEXTS = 12
"""Contexts on which losses are measured."""
LOSS_STRIDE = 16
"""Every so many queries of running text count in the losses."""
ANSWER_WEIGHT = 4.0
"""Of the loss where facts are answered beside that of running text."""


Sums = tuple[Tensor, int]


@dataclass(frozen=True, slots=True)
class Geometry:
    """What all heads have alike.

    Attributes:
        rule: of the priorities; its places and windows do not count.
        window, sinks: recent and first tokens that every head holds.
        sizes: numbers of anchors, ascending from 0, of which the losses are measured.
    """

    rule: AnchorConfig
    window: int
    sinks: int
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerFit:
    """What one layer's heads need. Two predictors: of the largest later attention, and of its mean.

    Attributes:
        weight, bias: [2, G, D] and [2, G], of the logarithms.
        correlation: [2, G], on contexts that they were not fitted to.
        recall: [G], attention from answers to the facts that they repeat, per fact.
        losses: [2, G, sizes], see `answer_losses`.
    """

    weight: Tensor
    bias: Tensor
    correlation: Tensor
    recall: Tensor
    losses: Tensor


@torch.no_grad()
def fit_layers(
    model: DiJiangForCausalLM,
    read: ReadTensor,
    contexts: Sequence[Context],
    geometry: Geometry,
    *,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> list[LayerFit]:
    """Reads the contexts with the softmax teacher, layer by layer; see `teacher_layers`.

    Args:
        model: on `meta`.
        on_layer: called with the number of layers that are done.

    Returns:
        What the layers need that see everything.
    """
    fits = []
    layers = teacher_layers(model, read, [context.token_ids for context in contexts])
    for layer, (attention, inputs) in enumerate(layers):
        if model.config.is_local(layer):
            deque(inputs, maxlen=0)
        else:
            fits.append(_fit_layer(inputs, contexts, geometry, output_weight(attention)))
        on_layer(layer + 1)
    return fits


def _fit_layer(
    inputs: Iterator[LayerInputs], contexts: Sequence[Context], geometry: Geometry, output: Tensor
) -> LayerFit:
    sums: dict[str, RidgeSums] = {}
    kept: list[tuple[LayerInputs, Context]] = []
    recall = torch.zeros(())
    for number, (read, context) in enumerate(zip(inputs, contexts, strict=True)):
        part, own = "held out" if number < NUM_HELD_OUT else "fitted", _ridge_sums(read, geometry)
        sums[part] = total([sums[part], own]) if part in sums else own
        recall = recall + recall_attention(read, context.recalled, window=geometry.window)
        if number < NUM_LOSS_CONTEXTS:
            kept.append((read, context))
    weight, bias = total(list(sums.values())).solve()
    correlation = sums["held out"].correlation(*sums["fitted"].solve())
    losses = [_losses(*pair, geometry, weight, bias, output) for pair in kept]
    num_facts = max(sum(len(context.recalled) for context in contexts), 1)
    shape = (2, -1)
    return LayerFit(
        weight.unflatten(0, shape).float(),
        bias.unflatten(0, shape).float(),
        correlation.unflatten(0, shape).float(),
        recall / num_facts,
        _mean(text for text, _ in losses) + ANSWER_WEIGHT * _mean(answers for _, answers in losses),
    )


def _ridge_sums(inputs: LayerInputs, geometry: Geometry) -> RidgeSums:
    """Of the tokens that enough queries look at; targets are [2 G]: of the largest attention, then of the mean."""
    attention = far_attention(inputs, window=geometry.window)
    counts = attention.queries >= max(len(inputs.x) // TOKENS_PER_QUERY, 1)
    counts[: geometry.sinks] = False
    targets = torch.cat([attention.largest, attention.mean]).clamp(min=SMALLEST_ATTENTION).log().T
    return RidgeSums.of(inputs.x[counts], targets[counts])


def _losses(
    inputs: LayerInputs, context: Context, geometry: Geometry, weight: Tensor, bias: Tensor, output: Tensor
) -> tuple[Sums, Sums]:
    """Sums and number of rows: of running text, and of answers to facts; see `answer_losses`."""
    scores = inputs.x @ weight.float().T + bias.float()
    priority = priorities(scores, geometry.rule).unflatten(0, (2, -1))
    first = geometry.sinks + geometry.window
    everywhere = torch.arange(first, len(inputs.x), LOSS_STRIDE)
    answered = [row for fact in context.recalled for row in range(fact.answered[0] - 1, fact.answered[1] - 1)]

    def measured(rows: Tensor) -> Sums:
        losses = answer_losses(
            inputs,
            priority,
            rows,
            output_weight=output,
            sizes=geometry.sizes,
            window=geometry.window,
            sinks=geometry.sinks,
        )
        return losses, len(rows)

    return measured(everywhere), measured(torch.tensor([row for row in answered if row >= first], dtype=torch.int64))


def _mean(sums: Iterable[Sums]) -> Tensor:
    totals, counts = zip(*sums, strict=True)
    mean: Tensor = torch.stack(totals).sum(0) / max(sum(counts), 1)
    return mean
