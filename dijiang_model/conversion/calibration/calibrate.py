"""Calibration: anchors and priorities for a budget of bytes, from one pass of the softmax teacher."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dijiang_model.checkpoints.outputs import CALIBRATION_FILE
from dijiang_model.config import AnchorConfig, ModelConfig
from dijiang_model.conversion.calibration.budgets import (
    allocate,
    anchored_config,
    linear_parts_that_pay,
    place_budget,
    with_features,
)
from dijiang_model.conversion.calibration.contexts import Context
from dijiang_model.conversion.calibration.fit import Geometry, LayerFit, fit_layers
from dijiang_model.conversion.calibration.linear_part import WIDTH, LinearFit, fit_linear_parts
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
        linear: [L, G], the share of its loss that a head's linear part saves, which `losses` are without; empty where
            none was fitted.
    """

    state_bytes: int
    sinks: int
    sizes: Sequence[int]
    losses: Sequence[Sequence[Sequence[float]]]
    correlation: Sequence[Sequence[float]]
    recall: Sequence[Sequence[float]]
    num_contexts: int
    num_tokens: int
    linear: Sequence[Sequence[float]] = ()

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
            document, known = json.loads(text), [field.name for field in fields(cls)]
            return cls(**{"linear": (), **{name: document[name] for name in known if name in document}})
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
        return anchored_config(base, anchors, window=budget.window, sinks=self.sinks, value_bits=budget.value_bits)


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibration with what goes into the model.

    Attributes:
        config: the network with its places; layers where it does not pay have no linear part.
        tensors: priorities, and the linear parts' decays and mixing weights, by their checkpoint names.
    """

    calibration: Calibration
    config: ModelConfig
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

    Then it reads them again, and fits each layer's linear part to what these places evict.

    Args:
        config: of the converted network: a hybrid whose windows do not count.
        read: gives the teacher's tensors under the names of the converted network.
        on_layer: called with layers done and in all, those of both readings.

    Raises:
        ConversionError: the budget is too small.
    """
    model, num = build_model(config, device="meta", dtype=torch.float32), config.num_layers
    bare, sinks = with_features(config, 0), config.layers[config.global_layers[0]].sinks
    budget = place_budget(bare, state_bytes, sinks=sinks)
    geometry = _geometry(budget.window, max(len(context.token_ids) for context in contexts), sinks)
    fits = fit_layers(model, read, contexts, geometry, on_layer=lambda done: on_layer(done, 2 * num))
    found, tensors = _chosen(bare, fits, geometry, contexts, state_bytes=state_bytes, num_anchors=budget.num_anchors)
    try:
        placed = found.config(with_features(config, WIDTH))
    except ConversionError:  # no room for a linear part
        on_layer(2 * num, 2 * num)
        return Calibrated(found, found.config(bare), tensors)
    linear = fit_linear_parts(
        model, read, contexts, placed, tensors, on_layer=lambda done: on_layer(num + done, 2 * num)
    )
    return _with_linear_parts(found, placed, tensors, linear)


def _geometry(window: int, length: int, sinks: int) -> Geometry:
    """What heads have alike while contexts of `length` tokens are read."""
    window = min(window, max(length // 8, 1))
    sizes = tuple(sorted({round(share * length) for share in SIZE_SHARES}))
    return Geometry(rule=AnchorConfig((sinks + window,), (window,)), window=window, sinks=sinks, sizes=sizes)


def _with_linear_parts(
    found: Calibration, placed: ModelConfig, tensors: Mapping[str, Tensor], fits: Sequence[LinearFit]
) -> Calibrated:
    """Linear parts where they save more than the places that their bytes could hold.

    Args:
        placed: the network whose places were fitted to, with a linear part in every layer.
    """
    losses = torch.tensor(found.losses)
    saved = torch.stack([fit.saved / fit.without.clamp(min=1e-12) for fit in fits]).float()  # [L, G]
    pays = linear_parts_that_pay(placed, losses, found.sizes, saved)
    layers, learned = list(placed.layers), dict(tensors)
    for layer, fit, is_worth_it in zip(placed.global_layers, fits, pays, strict=True):
        name = f"{FAMILIES[placed.family].paths.attention_of(layer)}.linear"
        if not is_worth_it:
            layers[layer] = replace(layers[layer], features=replace(layers[layer].features, width=0))
        else:
            learned |= {
                f"{name}.log_decay": fit.log_decay,
                f"{name}.mix_bias": fit.mix_bias,
                f"{name}.mix_weight": fit.mix_weight,
            }
    share = torch.where(torch.tensor(pays)[:, None], saved, 0.0)
    found = replace(found, losses=_rounded(losses * (1 - share)[..., None]), linear=_rounded(share))
    return Calibrated(found, found.config(replace(placed, layers=tuple(layers))), learned)


def _chosen(
    config: ModelConfig,
    fits: Sequence[LayerFit],
    geometry: Geometry,
    contexts: Sequence[Context],
    *,
    state_bytes: int,
    num_anchors: int,
) -> tuple[Calibration, Mapping[str, Tensor]]:
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
    return found, tensors


def _rounded(values: Tensor) -> Any:
    """Nested lists with four digits of each number, as much as is meaningful."""
    if values.dim() == 0:
        return float(f"{float(values):.4g}")
    return [_rounded(row) for row in values]
