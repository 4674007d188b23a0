"""The model that is trained: a converted model's weights with the linear part that training shall have."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dijiang_model.checkpoints.fingerprint import is_kernel_tensor
from dijiang_model.config import FeatureConfig, ModelConfig
from dijiang_model.conversion.training.calibrate import LookBack
from dijiang_model.errors import ConversionError
from dijiang_model.families import build_model
from dijiang_model.features import SIGNED_SPHERE, node_radii
from dijiang_model.model import DiJiangForCausalLM

SPHERE_RADIUS = 5.0
"""Of `signed_sphere` nodes. Theorem 3.2 would have sqrt(d), 8 for heads of 64; 5 learned best at few tokens."""


def check_trainable(config: ModelConfig) -> None:
    """Raises ConversionError for layers that these stages cannot train."""
    for index, layer in enumerate(config.layers):
        if layer.read_out != "denominator" or layer.decay != "static" or "matrix" in layer.features.bases:
            raise ConversionError(
                f"layer {index} has the read-out {layer.read_out}, the decay {layer.decay} and the bases "
                f"{', '.join(layer.features.bases)}; training takes recipes hybrid and pure: "
                "read-out denominator, decay static, bases of the DCT"
            )


def with_features(config: ModelConfig, features: FeatureConfig) -> ModelConfig:
    """The network with one feature map in all layers; its temperature fits the nodes and 1/sqrt(d).

    Layers with anchors keep theirs: more features would take the bytes that calibration gave to places.
    """
    radius = SPHERE_RADIUS if features.nodes == SIGNED_SPHERE else 1.0
    features = replace(features, scale=config.head_size**-0.25 * radius)
    layers = (layer if layer.anchors is not None else replace(layer, features=features) for layer in config.layers)
    return replace(config, layers=tuple(layers))


def new_student(
    base: DiJiangForCausalLM, config: ModelConfig, *, look_back: LookBack | None, seed: int
) -> DiJiangForCausalLM:
    """A model of `config` that shares the backbone's tensors with `base`; its kernels start from the calibration.

    Those of layers with anchors start as conversion made them.

    Args:
        look_back: None: kernels start at zero, to be filled by `Trainer.resume`.
        seed: of the far queries' updates.
    """
    check_trainable(config)
    if base.quantization is not None:
        raise ConversionError(
            f"the model's weights are {base.quantization.weights}, which cannot be trained; "
            "take the model it was made from"
        )
    student = build_model(config, dtype=base.dtype)
    state = base.state_dict()
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    prefixes = {f"{student.paths.attention_of(layer)}.linear.": layer for layer in range(config.num_layers)}
    for name, wanted in student.state_dict().items():
        if not is_kernel_tensor(name):
            tensors[name] = state[name]
            continue
        stem, _, part = name.rpartition(".")
        layer = prefixes[f"{stem}."]
        value = torch.zeros(wanted.shape)
        if part == "mix_bias" and config.is_local(layer):
            value = value - math.inf  # the window there is all that the teacher sees: nothing is left to learn
        elif look_back is not None and config.layers[layer].anchors is not None:
            value = state[name]
        elif look_back is not None:
            value = _start(part, wanted, config.layers[layer].features, layer, look_back, generator)
        tensors[name] = value.to(device=base.device, dtype=wanted.dtype).contiguous()
    student.load_state_dict(tensors, strict=True, assign=True)
    return student.prepare()


def _start(
    part: str, wanted: Tensor, features: FeatureConfig, layer: int, look_back: LookBack, generator: torch.Generator
) -> Tensor:
    starts: Mapping[str, Tensor] = {
        "log_decay": look_back.log_decay()[layer],
        "mix_bias": look_back.mix_bias[layer],
    }
    if part in starts:
        return starts[part]
    if part == "nodes":
        return node_radii(features.nodes, wanted.shape[1]).expand(wanted.shape)
    if part == "far_query_down":
        return torch.randn(wanted.shape, generator=generator) / math.sqrt(wanted.shape[1])
    return torch.zeros(wanted.shape)
