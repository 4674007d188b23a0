"""Gemma 3, text: most layers see a window only and stay exact; norms before and behind, normed queries and keys."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from dijiang_model.attention import DiJiangAttention
from dijiang_model.config import LocalLayers, ModelConfig
from dijiang_model.families.config_fields import Rope, common_config, rope_document, scaling_of
from dijiang_model.families.family import Family, Gguf, Metadata
from dijiang_model.families.llama import BUFFERS, PATHS, LlamaAttention, LlamaForCausalLM, LlamaMLP
from dijiang_model.families.parts import ACTIVATIONS, RMSNorm
from dijiang_model.formats.json_fields import Fields
from dijiang_model.ops import AttentionOp, LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.residual import Residual

GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0
DEFAULT_PATTERN = 6
"""Every so many layers one sees everything."""
LARGEST_LAYERS = 62
"""Of the 27B model, which alone scales queries by the hidden size."""


class Gemma3Block(nn.Module):
    """Attention, then MLP, each between two norms."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype, offset=config.norm_offset)

        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
        self.self_attn = LlamaAttention(config, layer, dtype=dtype)
        self.mlp = LlamaMLP(config, dtype=dtype)

    @property
    def dijiang(self) -> DiJiangAttention:
        return self.self_attn

    def forward(self, x: Residual, *, op: AttentionOp, layout: StepLayout, state: LayerState) -> Residual:
        x, normed = x.normed(self.input_layernorm)
        x = x.plus(self.post_attention_layernorm(self.self_attn(normed, op=op, layout=layout, state=state)))
        x, normed = x.normed(self.pre_feedforward_layernorm)
        return x.plus(self.post_feedforward_layernorm(self.mlp(normed)))


class Gemma3ForCausalLM(LlamaForCausalLM):
    """The family's modules under their checkpoint names; `lm_head` is absent when tied."""

    paths = replace(
        PATHS,
        mlp_norm="pre_feedforward_layernorm",
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        attention_output_norm="post_attention_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
    )
    block = Gemma3Block

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        x = super().embed(token_ids, positions)
        # As transformers does: the factor is rounded to the embedding's dtype. It is made on the device, for a recorded
        # step on CUDA may not copy from the host.
        return x * x.new_full((), self.config.embedding_scale)


def _gemma3(fields: Fields) -> ModelConfig:
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if name in fields:
            fields.report(f"{name} is set; it is not supported")
    if fields.boolean("use_bidirectional_attention", False):
        fields.report("use_bidirectional_attention is not supported")
    head_size, hidden_size = fields.integer("head_dim", 256), fields.integer("hidden_size")
    rope, local = _rope(fields)
    config = common_config(
        fields,
        family="gemma3_text",
        num_kv_heads=fields.integer("num_key_value_heads", 4),
        head_size=head_size,
        rotary_dims=head_size,
        rope=rope,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=fields.text("hidden_activation", "gelu_pytorch_tanh", choices=ACTIVATIONS),
        parallel_residual=False,
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=False,
        is_tied_by_default=True,
        default_token_ids=(2, 1),
    )
    return replace(
        config,
        qk_norm=True,
        local_layers=local,
        query_scale=(head_size / fields.number("query_pre_attn_scalar", 256)) ** 0.5,
        embedding_scale=hidden_size**0.5,
        norm_offset=1.0,
    )


def _rope(fields: Fields) -> tuple[Rope, LocalLayers | None]:
    """The rotation of the layers that see everything, and what is different in the others."""
    parameters = fields.nested("rope_parameters")
    of_global, of_local = parameters.nested("full_attention"), parameters.nested("sliding_attention")
    is_nested = "full_attention" in parameters
    theta = of_global.number("rope_theta", fields.number("rope_theta", GLOBAL_THETA))
    scaled = of_global if is_nested else fields.nested("rope_scaling")
    scaling = scaling_of(fields, scaled, "the rotary embedding")
    if scaling is not None and scaling.attention_factor != 1:
        fields.report("a yarn scaling is not supported in this family")
    if scaling_of(fields, of_local, "the local rotary embedding") is not None:
        fields.report("a scaled rotary embedding of sliding layers is not supported")
    local_theta = of_local.number("rope_theta", fields.number("rope_local_base_freq", LOCAL_THETA))
    indices = _local_indices(fields)
    window = fields.integer("sliding_window", 4096)
    return Rope(theta, 1.0, scaling), LocalLayers(indices, window, local_theta) if indices else None


def _local_indices(fields: Fields) -> tuple[int, ...]:
    num_layers, kinds = fields.integer("num_hidden_layers"), fields.value("layer_types")
    if kinds is None:
        pattern = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", DEFAULT_PATTERN))
        return tuple(index for index in range(num_layers) if (index + 1) % pattern)
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
        fields.report(f"layer_types must name {' or '.join(known)} for each of {num_layers} layers")
        return ()
    return tuple(index for index, kind in enumerate(kinds) if kind == "sliding_attention")


def _document(config: ModelConfig) -> dict[str, object]:
    local = config.local_layers
    kinds = ["sliding_attention" if config.is_local(index) else "full_attention" for index in range(config.num_layers)]
    return {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.norm_eps,
        "hidden_activation": config.activation,
        "rope_theta": config.rope_theta,
        "query_pre_attn_scalar": config.head_size / config.query_scale**2,
        "layer_types": kinds,
        **({} if local is None else {"sliding_window": local.window, "rope_local_base_freq": local.rope_theta}),
        **rope_document(config),
    }


def _gguf_config(value: Metadata) -> dict[str, object]:
    """llama.cpp stores neither which layers slide nor how queries are scaled: it knows both by the model's size."""
    heads, head_size = value("attention.head_count"), value("attention.key_length", 256)
    is_largest = value("block_count") == LARGEST_LAYERS
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": value("attention.sliding_window"),
        "sliding_window_pattern": value("attention.sliding_window_pattern", DEFAULT_PATTERN),
        "rope_local_base_freq": value("rope.freq_base_swa", LOCAL_THETA),
        "query_pre_attn_scalar": value("embedding_length") // heads if is_largest else head_size,
    }


GEMMA3 = Family(
    name="gemma3_text",
    network=Gemma3ForCausalLM,
    paths=Gemma3ForCausalLM.paths,
    read_config=_gemma3,
    write_config=_document,
    buffers=BUFFERS,
    sliding_window="by layer",
    gguf=Gguf("gemma3", norm_offset=1.0, config=_gguf_config),
)
