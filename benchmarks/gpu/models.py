"""Random models of true shapes for the GPU benchmarks, and HF's softmax twin on the same weights. No HTTP packages."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from dijiang_model.checkpoints.config_json import base_document
from dijiang_model.checkpoints.quantized import install
from dijiang_model.config import AnchorConfig, AttentionConfig, FeatureConfig, ModelConfig
from dijiang_model.families import build_model
from dijiang_model.features import node_radii
from dijiang_model.kernel import released_log_decay
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.quantization.config import INT8, Quantization
from dijiang_model.quantization.modules import quantized_weights
from dijiang_model.quantization.weight import Int4Weight, QuantizedWeight
from dijiang_model.state import StateBuffer

LLAMA = ModelConfig(
    "llama", 32_000, 4096, 11_008, 32, 32, 128, 128, 10_000.0, 4096, 1e-5, "silu", False, False, False, False,
    (AttentionConfig(),) * 32,
)  # fmt: skip
SHAPES: Mapping[str, ModelConfig] = {
    "pythia-2.8b": replace(
        LLAMA, family="gpt_neox", vocab_size=50_304, hidden_size=2560, intermediate_size=10_240, head_size=80,
        rotary_dims=20, max_position_embeddings=2048, activation="gelu", parallel_residual=True, attention_bias=True,
        mlp_bias=True, position_table_length=2048,
    ),
    "llama-2-7b": LLAMA,
    "smollm2-135m": replace(
        LLAMA, vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_size=64,
        rotary_dims=64, rope_theta=100_000.0, max_position_embeddings=8192, tie_word_embeddings=True,
        layers=(AttentionConfig(),) * 30,
    ),
    "tiny": replace(
        LLAMA, vocab_size=300, hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=1, head_size=16,
        rotary_dims=16, max_position_embeddings=64, tie_word_embeddings=True, layers=(AttentionConfig(),),
    ),
    "tiny-neox": replace(
        LLAMA, family="gpt_neox", vocab_size=300, hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=2,
        head_size=16, rotary_dims=4, max_position_embeddings=64, activation="gelu", parallel_residual=True,
        attention_bias=True, mlp_bias=True, layers=(AttentionConfig(),), position_table_length=64,
    ),
}  # fmt: skip
ATTENTION: Mapping[str, Callable[[int], AttentionConfig]] = {
    "pure": lambda size: AttentionConfig(FeatureConfig(scale=size**-0.25)),
    "hybrid": lambda size: AttentionConfig(
        FeatureConfig(scale=size**-0.25, nodes="signed_sphere", far_rank=16, rotated=False), window=60, sinks=4
    ),
    "anchors": lambda size: AttentionConfig(
        FeatureConfig(scale=size**-0.25, width=1, rotated=False),
        window=60,
        sinks=4,
        anchors=AnchorConfig((643,), (60,)),
    ),
    "released": lambda _: AttentionConfig(
        FeatureConfig(("matrix",), nodes="checkpoint"), read_out="group_norm", decay="table"
    ),
}
"""In softmax attention's place: features alone, beside a window of 60 + 4, beside as many places a head as the default
model's, or as the paper's authors released it."""


WEIGHTS: Mapping[str, Quantization | None] = {
    "plain": None,
    "int8": INT8,
    "int4": Quantization("int4", group_size=32),
    "int4-minimums": Quantization("int4", group_size=32, has_minimums=True),
}
"""How weights are rounded; embedding and head are int8 where any are."""
SPREAD = 0.02
"""Standard deviation of a weight."""


def config_of(shape: str, attention: str) -> ModelConfig:
    """A shape with the same attention in every layer."""
    config = SHAPES[shape]
    layer = ATTENTION[attention](config.head_size)
    if layer.anchors is not None:
        places, windows = (one * config.num_kv_heads for one in (layer.anchors.places, layer.anchors.windows))
        layer = replace(layer, anchors=replace(layer.anchors, places=places, windows=windows))
    return replace(config, layers=(layer,) * config.num_layers)


@torch.no_grad()
def random_model(
    config: ModelConfig, *, device: str, dtype: torch.dtype, quantization: Quantization | None = None
) -> DiJiangForCausalLM:
    """Made on the device; every part of the attention is awake. With TRITON_INTERPRET=1 its attention is Triton's.

    With a quantization codes are drawn as they are, and nothing is rounded.
    """
    model = build_model(config, device=device, dtype=dtype)
    if quantization is not None:
        install(model, quantization)
    for _, weight in quantized_weights(model):
        _draw(weight)
    for name, parameter in model.named_parameters():
        _fill(name.rsplit(".", 1)[-1], name, parameter, config)
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
        from dijiang_model.ops.triton import TritonAttention

        model.attention_op = TritonAttention()
    return model.prepare()


def _draw(weight: QuantizedWeight) -> None:
    """Codes that are all as likely, and scales that give them the spread of other weights."""
    if not isinstance(weight, Int4Weight):
        weight.codes.random_(-127, 128)
        weight.scales.fill_(SPREAD / 73.3)
        return
    weight.codes.random_(0, 256)
    weight.scales.fill_(SPREAD / 4.61)
    if weight.minimums is not None:
        weight.minimums.fill_(-7.5 * SPREAD / 4.61)


def _fill(kind: str, name: str, parameter: Tensor, config: ModelConfig) -> None:
    if kind == "nodes":
        parameter.copy_(node_radii("midpoint", parameter.shape[1]))
    elif kind == "log_decay":
        parameter.copy_(released_log_decay(max(2, len(parameter)))[: len(parameter)])
    elif kind in ("read_table", "write_table"):
        steps = released_log_decay(parameter.shape[0])[:, None] * torch.arange(parameter.shape[1])
        parameter.copy_((steps if kind == "read_table" else -steps).exp())
    elif kind == "log_weights":
        parameter.zero_()
    elif kind == "mix_bias":
        parameter.fill_(-3.0)
    elif "norm" in name:
        parameter.fill_(1.0 if kind == "weight" else 0.0)
    else:
        parameter.normal_(0.0, SPREAD)


def filled_state(model: DiJiangForCausalLM, num_slots: int) -> StateBuffer:
    """Slots as after a long conversation: random numbers, positive normalisers; never zeros, which are faster."""
    buffer = StateBuffer(model.state_spec, num_slots + 1, model.device)
    buffer.storage.zero_()
    for name, tensor in buffer.tensors.items():
        for slot in range(1, num_slots + 1):  # slot by slot: random numbers of all at once would need as much again
            tensor[slot].copy_(_noise(name, tensor[slot]))
    return buffer


def _noise(name: str, tensor: Tensor) -> Tensor:
    """Of a size as a state has it: codes and their scales, normalisers, sums."""
    random = torch.randn(tensor.shape, device=tensor.device)
    if tensor.dtype == torch.int8:
        return (random * 40).clamp(-127, 127)
    if name.endswith("_scales"):
        return random.abs() * 1e-3
    return random.abs() + 1 if name.endswith("normaliser") else random * 0.1


def softmax_twin(model: DiJiangForCausalLM) -> Any:
    """HF's model with scaled-dot-product attention on the same tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM  # ours are measured with any version, and without it
    from transformers.utils import logging

    logging.set_verbosity_error()
    base = {name: value for name, value in base_document(model.config).items() if value is not None}
    config = AutoConfig.for_model(base.pop("model_type"), **base)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=model.dtype)
    own = (".linear.", ".gate.", ".group_norm.")
    tensors = {name: one for name, one in model.state_dict().items() if not any(part in name for part in own)}
    if "embed_out.weight" in tensors:  # as later versions of transformers name GPT-NeoX's head
        tensors["lm_head.weight"] = tensors["embed_out.weight"]
    twin.load_state_dict(tensors, strict=False, assign=True)
    twin.tie_weights()
    rotaries = [(parent, name) for parent, name, _ in _children(twin) if name == "rotary_emb"]
    for parent, name in rotaries:
        setattr(parent, name, type(getattr(parent, name))(config=config).to(model.device))
    missing = [name for name, one in [*twin.named_parameters(), *twin.named_buffers()] if one.is_meta]
    assert not missing, missing
    for name, value in (("num_key_value_heads", model.config.num_kv_heads), ("head_dim", model.config.head_size)):
        if not hasattr(twin.config, name):  # GPT-NeoX's config has neither; whoever fills a cache asks for them
            setattr(twin.config, name, value)
    return twin.eval()


def _children(module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [(parent, name, child) for parent in module.modules() for name, child in parent.named_children()]
