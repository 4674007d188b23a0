"""Calibration: anchors and priorities for a budget of bytes, from one pass of the softmax teacher."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dijiang_model.checkpoints.outputs import CALIBRATION_FILE
from dijiang_model.config import AnchorConfig, ModelConfig
from dijiang_model.conversion.calibration.budgets import AGE, allocate, anchored_config, place_budget
from dijiang_model.conversion.calibration.contexts import Context
from dijiang_model.conversion.calibration.fit import Geometry, LayerFit, fit_layers
from dijiang_model.conversion.calibration.teacher_pass import ReadTensor
from dijiang_model.conversion.training.adapters import calibration_text
from dijiang_model.errors import ConversionError
from dijiang_model.families import FAMILIES, build_model

SIZE_SHARES = (0, 1 / 32, 1 / 16, 3 / 32, 5 / 32, 1 / 4, 11 / 32, 15 / 32, 11 / 16, 1)
"""Numbers of anchors of which losses are measured, as shares of a context."""
LEAST_RANGE = 2048
"""A head gets anchors for no more tokens than the teacher was trained to see, but for so many at least."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was found, as JSON keeps it: enough to divide other budgets by the same losses.

    Attributes:
        state_bytes: the budget that priorities were chosen for.
        sinks: first tokens that every head holds.
        sizes, losses: what each head [L, G] loses with so many anchors; L layers see everything.
        correlation: [L, G], of predicted and true log attention on text that the predictor was not fitted to.
        recall: [L, G], attention from answers to the facts that they repeat.
        num_contexts, num_tokens: what the teacher read.
    """

    state_bytes: int
    sinks: int
    sizes: Sequence[int]
    losses: Sequence[Sequence[Sequence[float]]]
    correlation: Sequence[Sequence[float]]
    recall: Sequence[Sequence[float]]
    num_contexts: int
    num_tokens: int

    @classmethod
    def read(cls, folder: Path) -> "Calibration | None":
        """What a model's folder keeps; None: it was not calibrated.

        Raises:
            ConversionError: the file is damaged.
        """
        text = calibration_text(folder)
        return None if text is None else cls.parse(text)

    @classmethod
    def parse(cls, text: str) -> "Calibration":
        """Raises ConversionError for a text that `json` did not write."""
        try:
            document = json.loads(text)
            return cls(**{field.name: document[field.name] for field in fields(cls)})
        except (ValueError, TypeError, KeyError) as error:
            raise ConversionError(f"{CALIBRATION_FILE} is damaged: {error}; convert the model again") from error

    def json(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    def config(self, base: ModelConfig, *, state_bytes: int | None = None) -> ModelConfig:
        """The network with anchors for a budget of bytes, by default the one that was calibrated for.

        Raises:
            ConversionError: the budget is too small.
        """
        budget = place_budget(base, self.state_bytes if state_bytes is None else state_bytes, sinks=self.sinks)
        most = max(base.max_position_embeddings, LEAST_RANGE)
        anchors = allocate(torch.tensor(self.losses), self.sizes, num_anchors=budget.num_anchors, most=most)
        return anchored_config(base, anchors, window=budget.window, sinks=self.sinks)


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibration with the priorities that go into the model, by their checkpoint names."""

    calibration: Calibration
    tensors: Mapping[str, Tensor]


def calibrate(
    config: ModelConfig,
    read: ReadTensor,
    contexts: Sequence[Context],
    *,
    state_bytes: int,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Calibrated:
    """Reads the contexts with the softmax teacher and learns which tokens each head will need.

    Args:
        config: of the converted network: a hybrid whose windows do not count.
        read: gives the teacher's tensors under the names of the converted network.
        on_layer: called with layers done and in all.

    Raises:
        ConversionError: the budget is too small.
    """
    sinks = config.layers[config.global_layers[0]].sinks
    budget = place_budget(config, state_bytes, sinks=sinks)
    length = max(len(context.token_ids) for context in contexts)
    window = min(budget.window, max(length // 8, 1))
    geometry = Geometry(
        rule=AnchorConfig((sinks + window,), (window,), age=AGE),
        window=window,
        sinks=sinks,
        sizes=tuple(sorted({round(share * length) for share in SIZE_SHARES})),
    )
    model = build_model(config, device="meta", dtype=torch.float32)
    fits = fit_layers(model, read, contexts, geometry, on_layer=lambda done: on_layer(done, config.num_layers))
    return _chosen(config, fits, geometry, contexts, state_bytes=state_bytes, num_anchors=budget.num_anchors)


def _chosen(
    config: ModelConfig,
    fits: Sequence[LayerFit],
    geometry: Geometry,
    contexts: Sequence[Context],
    *,
    state_bytes: int,
    num_anchors: int,
) -> Calibrated:
    """Each head takes the predictor that loses less with the anchors that it gets."""
    losses = torch.stack([fit.losses for fit in fits])  # [L, 2, G, M]
    anchors = allocate(losses.amin(1), geometry.sizes, num_anchors=num_anchors, most=max(geometry.sizes))
    size = torch.bucketize(anchors, torch.tensor(geometry.sizes), right=True) - 1  # [L, G]
    at_size = losses.gather(3, size[:, None, :, None].expand(-1, 2, -1, 1))[..., 0]
    predictor = at_size.argmin(1)  # [L, G]

    def pick(values: Tensor) -> Tensor:
        """[L, 2, G, ...] -> [L, G, ...]"""
        index = predictor[:, None].view(len(fits), 1, -1, *[1] * (values.dim() - 3))
        return values.gather(1, index.expand(-1, 1, -1, *values.shape[3:]))[:, 0]

    weight, bias = pick(torch.stack([fit.weight for fit in fits])), pick(torch.stack([fit.bias for fit in fits]))
    paths = FAMILIES[config.family].paths
    tensors: dict[str, Tensor] = {}
    for number, layer in enumerate(config.global_layers):
        name = f"{paths.attention_of(layer)}.linear.priority"
        tensors |= {f"{name}_weight": weight[number], f"{name}_bias": bias[number]}
    found = Calibration(
        state_bytes=state_bytes,
        sinks=geometry.sinks,
        sizes=geometry.sizes,
        losses=_rounded(pick(losses)),
        correlation=_rounded(pick(torch.stack([fit.correlation for fit in fits]))),
        recall=_rounded(torch.stack([fit.recall for fit in fits])),
        num_contexts=len(contexts),
        num_tokens=sum(len(context.token_ids) for context in contexts),
    )
    return Calibrated(found, tensors)


def _rounded(values: Tensor) -> Any:
    """Nested lists with four digits of each number, as much as is meaningful."""
    if values.dim() == 0:
        return float(f"{float(values):.4g}")
    return [_rounded(row) for row in values]
