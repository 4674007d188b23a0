"""The same weights with a part switched off, or with another budget for the tokens that are held."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dijiang_model.config import ModelConfig
from dijiang_model.families import build_model
from dijiang_model.model import DiJiangForCausalLM


def silenced(model: DiJiangForCausalLM, *, window: int | None = None, sinks: int | None = None) -> DiJiangForCausalLM:
    """The same weights with the linear part off; nothing of `model` is changed.

    Args:
        window, sinks: of all layers, which then have no anchors; None: the model's own.
    """
    layers = tuple(
        layer if window is None or sinks is None else replace(layer, window=window, sinks=sinks, anchors=None)
        for layer in model.config.layers
    )
    config = replace(model.config, layers=layers)
    off = {
        name: torch.full(wanted.shape, -torch.inf if name.endswith("mix_bias") else 0.0, dtype=wanted.dtype)
        for name, wanted in build_model(config, dtype=model.dtype).state_dict().items()
        if ".linear.mix_" in name
    }
    return with_config(model, config, off)


def with_config(
    model: DiJiangForCausalLM, config: ModelConfig, replaced: Mapping[str, Tensor] | None = None
) -> DiJiangForCausalLM:
    """The same weights in another network, whose tensors have the same shapes.

    Args:
        replaced: tensors that are taken instead of the model's, by name.
    """
    made = build_model(config, dtype=model.dtype)
    state = {**model.state_dict(), **(replaced or {})}
    tensors = {name: state[name].to(model.device) for name in made.state_dict()}
    made.load_state_dict(tensors, strict=True, assign=True)
    return made.prepare()
