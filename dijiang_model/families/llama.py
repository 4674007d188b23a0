"""LLaMA (LLaMA-2, TinyLLaMA, SmolLM): RMSNorm, SwiGLU, grouped-query heads, sequential residual."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from dijiang_model.attention import DiJiangAttention
from dijiang_model.config import ModelConfig
from dijiang_model.families.config_fields import common_config, head_size_of, read_rope, rope_document
from dijiang_model.families.family import Family
from dijiang_model.families.parts import ACTIVATIONS, empty_embedding
from dijiang_model.formats.json_fields import Fields
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import AttentionOp, LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.selection import gated_product, residual_norm
from dijiang_model.paths import Paths
from dijiang_model.quantization.weight import QuantizedWeight

PATHS = Paths(
    embedding="model.embed_tokens",
    head="lm_head",
    final_norm="model.norm",
    layers="model.layers",
    attention="self_attn",
    input_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    mlp_gate="mlp.gate_proj",
    mlp_up="mlp.up_proj",
    mlp_down="mlp.down_proj",
)


class LlamaAttention(DiJiangAttention):
    """Separate q, k, v and output projections."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__(config, layer, dtype=dtype)
        hidden, bias = config.hidden_size, config.attention_bias
        queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.q_proj = nn.Linear(hidden, queries, bias=bias, dtype=dtype)
        self.k_proj = nn.Linear(hidden, keys, bias=bias, dtype=dtype)
        self.v_proj = nn.Linear(hidden, keys, bias=bias, dtype=dtype)
        self.o_proj = nn.Linear(queries, hidden, bias=bias, dtype=dtype)

    def forward(self, x: Tensor, *, op: AttentionOp, layout: StepLayout, state: LayerState) -> Tensor:
        heads = (-1, self.config.head_size)
        q = self.q_proj(x).unflatten(1, heads)
        k = self.k_proj(x).unflatten(1, heads)
        v = self.v_proj(x).unflatten(1, heads)
        output: Tensor = self.o_proj(self.attend(x, q, k, v, op=op, layout=layout, state=state))
        return output


class LlamaMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = ACTIVATIONS[config.activation]
        self.gate_proj = nn.Linear(hidden, inner, bias=bias, dtype=dtype)
        self.up_proj = nn.Linear(hidden, inner, bias=bias, dtype=dtype)
        self.down_proj = nn.Linear(inner, hidden, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(gated_product(self.gate_proj(x), self.up_proj(x), self.activation))
        return output


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 for narrower inputs."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype))
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LlamaBlock(nn.Module):
    """Pre-norm attention, then pre-norm MLP."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config, dtype=dtype)
        self.self_attn = LlamaAttention(config, layer, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config, dtype=dtype)
        self.mlp = LlamaMLP(config, dtype=dtype)

    @property
    def dijiang(self) -> DiJiangAttention:
        return self.self_attn

    def forward(self, x: Tensor, *, op: AttentionOp, layout: StepLayout, state: LayerState) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), op=op, layout=layout, state=state)
        x, normed = residual_norm(x, attended, self.post_attention_layernorm)
        output: Tensor = x + self.mlp(normed)
        return output


class LlamaBackbone(nn.Module):
    """Embedding, blocks and final norm, under HF's prefix `model`."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = empty_embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(LlamaBlock(config, i, dtype=dtype) for i in range(config.num_layers))
        self.norm = RMSNorm(config, dtype=dtype)


class LlamaForCausalLM(DiJiangForCausalLM):
    """The family's modules under their checkpoint names; `lm_head` is absent when tied."""

    paths = PATHS

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__(config)
        self.model = LlamaBackbone(config, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        self.is_tied = config.tie_word_embeddings

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def head(self) -> Tensor | QuantizedWeight:
        """[vocab, D]."""
        return self.model.embed_tokens.weight if self.is_tied else self.lm_head.weight

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = self.model.embed_tokens(token_ids)
        return x

    def finish(self, x: Tensor) -> Tensor:
        normed: Tensor = self.model.norm(x)
        return normed


def _llama(fields: Fields) -> ModelConfig:
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    if "head_dim" in fields:
        head_size = fields.integer("head_dim")
    else:
        head_size = head_size_of(fields, hidden_size, num_heads)
    rope = read_rope(fields, theta_name="rope_theta", factor_name="partial_rotary_factor", default_factor=1.0)
    if rope.share != 1:
        fields.report(f"partial_rotary_factor is {rope.share}, must be 1 for llama")
    fields.integer("pretraining_tp", 1)  # any value computes the same function, split differently
    return common_config(
        fields,
        family="llama",
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_size=head_size,
        rotary_dims=head_size,
        rope=rope,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=fields.text("hidden_act", "silu", choices=ACTIVATIONS),
        parallel_residual=False,
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
        default_token_ids=(1, 2),
    )


def _document(config: ModelConfig) -> Mapping[str, object]:
    return {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "mlp_bias": config.mlp_bias,
        **rope_document(config),
    }


LLAMA = Family(
    name="llama",
    network=LlamaForCausalLM,
    paths=PATHS,
    read_config=_llama,
    write_config=_document,
    buffers=re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
)
