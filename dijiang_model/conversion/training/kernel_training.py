"""The kernels' tensors under training: which of them learn, how fast, and under which constraint."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dijiang_model.errors import ConversionError
from dijiang_model.model import DiJiangForCausalLM

VECTORS = ("nodes", "log_weights", "log_decay", "mix_bias", "mix_weight")
MATRICES = ("far_query_down", "far_query_up")
PRIORITIES = ("priority_weight", "priority_bias")
"""Of layers with anchors: chosen by calibration, no gradient reaches them."""


class NegativeExponential(nn.Module):
    """log decay = -exp(raw): stays below 0 whatever a step does; steps are relative to the decay rate."""

    def forward(self, raw: Tensor) -> Tensor:
        return -raw.exp()

    def right_inverse(self, log_decay: Tensor) -> Tensor:
        return (-log_decay).clamp(min=1e-8).log()


def make_trainable(model: DiJiangForCausalLM) -> None:
    """Freezes everything but the kernels' tensors, and keeps the decays below 1. In place."""
    model.requires_grad_(False)
    for attention in model.attentions:
        kernel = attention.linear
        parametrize.register_parametrization(kernel, "log_decay", NegativeExponential())
        for name, parameter in kernel.named_parameters():
            parameter.requires_grad_(name not in PRIORITIES)


def silence(model: DiJiangForCausalLM) -> None:
    """Turns the linear part of every layer off, for good: beta = 0, and nothing of it learns. In place.

    Raises:
        ConversionError: a layer without a window, where nothing would be left.
    """
    for layer, attention in enumerate(model.attentions):
        if attention.linear.attention.window == 0:
            raise ConversionError(f"layer {layer} has no window to train alone")
        attention.linear.requires_grad_(False)
        attention.linear.mix_bias.fill_(-torch.inf)


def kernel_tensors(model: DiJiangForCausalLM) -> dict[str, Tensor]:
    """Checkpoint names and values of the kernels' tensors, detached; also while they are under training."""
    tensors: dict[str, Tensor] = {}
    for layer, attention in enumerate(model.attentions):
        prefix = f"{model.paths.attention_of(layer)}.linear"
        for name in (*VECTORS, *MATRICES, *PRIORITIES):
            value = getattr(attention.linear, name, None)
            if isinstance(value, Tensor):
                tensors[f"{prefix}.{name}"] = value.detach().clone()
    return tensors


def trained_parameters(model: DiJiangForCausalLM, names: tuple[str, ...]) -> Iterator[nn.Parameter]:
    """The parameters behind some of the kernels' tensors, layer by layer."""
    for attention in model.attentions:
        for name, parameter in attention.linear.named_parameters():
            parts = name.split(".")
            stem = parts[1] if parts[0] == "parametrizations" else parts[0]
            if stem in names:
                yield parameter


def fill_kernels(model: DiJiangForCausalLM, tensors: Mapping[str, Tensor]) -> None:
    """Gives the kernels under training the values of `kernel_tensors`, in place."""
    with torch.no_grad():
        for layer, attention in enumerate(model.attentions):
            prefix = f"{model.paths.attention_of(layer)}.linear"
            for name in (*VECTORS, *MATRICES, *PRIORITIES):
                value = tensors.get(f"{prefix}.{name}")
                if value is None:
                    continue
                if name == "log_decay":
                    # A property here: the value passes its constraint into the parameter behind it.
                    setattr(attention.linear, name, value.to(attention.linear.log_decay))
                else:
                    getattr(attention.linear, name).copy_(value)
