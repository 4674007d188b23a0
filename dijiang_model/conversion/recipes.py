"""What replaces softmax attention at conversion, and the values its fresh tensors start with.

- `hybrid`: a window of exact softmax with sinks beside the linear part, which starts silent: the model
  computes just what the window model computes, and answers without any training.
- `pure`: the paper's normalised kernel alone, the teacher's projections kept.
- `released`: as the authors' code starts: no denominator, fresh swish gate and GroupNorm.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import StrEnum

import torch
from torch import Tensor

from dijiang_model.config import AttentionConfig, FeatureConfig, ModelConfig
from dijiang_model.features import node_radii
from dijiang_model.kernel import released_log_decay

NODES = "van_der_corput"
"""Low-discrepancy over any run of frequencies, where sorted nodes would give each frequency band one radius."""
HALF_LIVES_TOKENS = (15.0, 900.0)
"""Shortest and longest half-life over the key-value heads; training found 15, 90 and 900 for three."""
GATE_STD = 0.02


class Recipe(StrEnum):
    """How softmax attention is replaced."""

    HYBRID = "hybrid"
    PURE = "pure"
    RELEASED = "released"


def converted_config(base: ModelConfig, recipe: Recipe, *, window: int, sinks: int) -> ModelConfig:
    """The backbone with the recipe's attention in every layer.

    Args:
        window, sinks: exact-softmax tokens of `hybrid`; other recipes have none, whatever is given. Layers in which the
            teacher sees a window alone keep that one.
    """
    scale = base.head_size**-0.25
    match recipe:
        case Recipe.HYBRID:
            attention = AttentionConfig(FeatureConfig(scale=scale, nodes=NODES), window=window, sinks=sinks)
        case Recipe.PURE:
            attention = AttentionConfig(FeatureConfig(scale=scale, nodes=NODES))
        case Recipe.RELEASED:
            attention = AttentionConfig(FeatureConfig(scale=1.0, nodes=NODES), read_out="group_norm")
    layers = [attention] * base.num_layers
    if base.local_layers is not None:  # they stay what they are: a window over all that the teacher sees there
        kept = AttentionConfig(FeatureConfig(scale=scale, nodes=NODES), window=base.local_layers.window)
        for index in base.local_layers.indices:
            layers[index] = kept
    return replace(base, layers=tuple(layers))


def is_fresh(name: str) -> bool:
    """Whether no teacher has this tensor of an attention module, e.g. `linear.nodes`."""
    return name in _FRESH


def fresh_tensor(name: str, shape: tuple[int, ...], config: ModelConfig, *, layer: int, seed: int) -> Tensor:
    """The start value of a tensor that no teacher has.

    Args:
        name: under the attention module; see `is_fresh`.
        shape: its shape.
        layer: whose features and seed apply.
        seed: of the random ones; recorded in the config.
    """
    return _FRESH[name](shape, config, layer, seed)


def _nodes(shape: tuple[int, ...], config: ModelConfig, layer: int, seed: int) -> Tensor:
    radii = node_radii(config.layers[layer].features.nodes, shape[1])
    return radii.expand(shape)


def _log_decay(shape: tuple[int, ...], config: ModelConfig, layer: int, seed: int) -> Tensor:
    (num,) = shape
    if config.layers[layer].read_out == "group_norm":
        return released_log_decay(num)
    shortest, longest = (math.log(tokens) for tokens in HALF_LIVES_TOKENS)
    middle = torch.tensor([(shortest + longest) / 2], dtype=torch.float64)
    logs = middle if num == 1 else torch.linspace(shortest, longest, num, dtype=torch.float64)
    return -math.log(2) * torch.exp(-logs)


def _gate(shape: tuple[int, ...], config: ModelConfig, layer: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + layer)
    return GATE_STD * torch.randn(shape, generator=generator)


def _constant(value: float) -> Callable[[tuple[int, ...], ModelConfig, int, int], Tensor]:
    return lambda shape, config, layer, seed: torch.full(shape, value)


_FRESH: Mapping[str, Callable[[tuple[int, ...], ModelConfig, int, int], Tensor]] = {
    "linear.nodes": _nodes,
    "linear.log_weights": _constant(0.0),
    "linear.log_decay": _log_decay,
    "linear.mix_bias": _constant(-math.inf),
    "linear.mix_weight": _constant(0.0),
    "gate.weight": _gate,
    "group_norm.weight": _constant(1.0),
    "group_norm.bias": _constant(0.0),
}
