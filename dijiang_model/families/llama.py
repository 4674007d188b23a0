"""LLaMA (LLaMA-2, TinyLLaMA, SmolLM): RMSNorm, SwiGLU, grouped-query heads, sequential residual."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from dijiang_model.attention import DiJiangAttention
from dijiang_model.config import ModelConfig
from dijiang_model.families.config_fields import common_config, head_size_of, read_rope, rope_document
from dijiang_model.families.family import Family, Gguf
from dijiang_model.families.parts import ACTIVATIONS, AllHeadsNorm, RMSNorm, empty_embedding
from dijiang_model.formats.json_fields import Fields
from dijiang_model.merged import products
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import AttentionOp, LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.residual import Residual
from dijiang_model.ops.selection import gated_product
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
    """Separate q, k, v and output projections; queries and keys may be normed, head by head or all heads together."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__(config, layer, dtype=dtype)
        hidden, bias = config.hidden_size, config.attention_bias
        queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.q_proj = nn.Linear(hidden, queries, bias=bias, dtype=dtype)
        self.k_proj = nn.Linear(hidden, keys, bias=bias, dtype=dtype)
        self.v_proj = nn.Linear(hidden, keys, bias=bias, dtype=dtype)
        has_output_bias = bias if config.output_bias is None else config.output_bias
        self.o_proj = nn.Linear(queries, hidden, bias=has_output_bias, dtype=dtype)
        self.q_norm: RMSNorm
        self.k_norm: RMSNorm
        if config.norms_all_heads:
            self.q_norm = AllHeadsNorm(queries, eps=config.norm_eps, dtype=dtype)
            self.k_norm = AllHeadsNorm(keys, eps=config.norm_eps, dtype=dtype)
        elif config.qk_norm:
            self.q_norm = RMSNorm(config.head_size, eps=config.norm_eps, dtype=dtype, offset=config.norm_offset)
            self.k_norm = RMSNorm(config.head_size, eps=config.norm_eps, dtype=dtype, offset=config.norm_offset)

    def forward(self, x: Tensor, *, op: AttentionOp, layout: StepLayout, state: LayerState) -> Tensor:
        heads = (-1, self.config.head_size)
        q, k, v = (one.unflatten(1, heads) for one in products(x, self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.query_scale != 1:
            q = q * self.config.query_scale
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
        gate, up = products(x, self.gate_proj, self.up_proj)
        output: Tensor = self.down_proj(gated_product(gate, up, self.activation))
        return output


class LlamaBlock(nn.Module):
    """Pre-norm attention, then pre-norm MLP."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.self_attn = LlamaAttention(config, layer, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.mlp = LlamaMLP(config, dtype=dtype)

    @property
    def dijiang(self) -> DiJiangAttention:
        return self.self_attn

    def forward(self, x: Residual, *, op: AttentionOp, layout: StepLayout, state: LayerState) -> Residual:
        x, normed = x.normed(self.input_layernorm)
        x = x.plus(self.self_attn(normed, op=op, layout=layout, state=state))
        x, normed = x.normed(self.post_attention_layernorm)
        return x.plus(self.mlp(normed))


class LlamaBackbone(nn.Module):
    """Embedding, blocks and final norm, under HF's prefix `model`."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, block: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = empty_embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(block(config, i, dtype=dtype) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype, offset=config.norm_offset)


class LlamaForCausalLM(DiJiangForCausalLM):
    """The family's modules under their checkpoint names; `lm_head` is absent when tied."""

    paths = PATHS
    block: ClassVar[Callable[..., nn.Module]] = LlamaBlock

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__(config)
        self.model = LlamaBackbone(config, dtype=dtype, block=self.block)
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

    def finish(self, x: Residual) -> Tensor:
        return x.normed(self.model.norm)[1]


def read_llama_like(
    fields: Fields,
    *,
    family: str,
    attention_bias: bool,
    mlp_bias: bool = False,
    output_bias: bool | None = None,
    qk_norm: bool = False,
    teacher_window: int = 0,
    default_head_size: int | None = None,
    default_norm_eps: float = 1e-6,
    rotates_in_part: bool = False,
    default_token_ids: tuple[int | None, int | None] = (None, None),
) -> ModelConfig:
    """The network of a config with LLaMA's dimensions; the arguments are what families differ in.

    Args:
        default_head_size: where the config does not say; None: the heads share the hidden size.
        rotates_in_part: whether some channels of a head may stay as they are.
    """
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    if "head_dim" in fields or default_head_size is not None:
        head_size = fields.integer("head_dim", default_head_size)
    else:
        head_size = head_size_of(fields, hidden_size, num_heads)
    rope = read_rope(fields, theta_name="rope_theta", factor_name="partial_rotary_factor", default_factor=1.0)
    if rope.share != 1 and not rotates_in_part:
        fields.report(f"partial_rotary_factor is {rope.share}, must be 1 for {family}")
    config = common_config(
        fields,
        family=family,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_size=head_size,
        rotary_dims=int(head_size * rope.share),
        rope=rope,
        norm_eps=fields.number("rms_norm_eps", default_norm_eps),
        activation=fields.text("hidden_act", "silu", choices=ACTIVATIONS),
        parallel_residual=False,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        default_token_ids=default_token_ids,
    )
    return replace(config, output_bias=output_bias, qk_norm=qk_norm, teacher_window=teacher_window)


def llama_document(config: ModelConfig) -> dict[str, object]:
    """What an HF config says beside what all families' say, as `read_llama_like` reads it."""
    return {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        **rope_document(config),
    }


def _llama(fields: Fields) -> ModelConfig:
    fields.integer("pretraining_tp", 1)  # any value computes the same function, split differently
    return read_llama_like(
        fields,
        family="llama",
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
        default_token_ids=(1, 2),
    )


BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
LLAMA = Family(
    name="llama",
    network=LlamaForCausalLM,
    paths=PATHS,
    read_config=_llama,
    write_config=lambda config: {**llama_document(config), "mlp_bias": config.mlp_bias},
    buffers=BUFFERS,
    gguf=Gguf("llama", pairs_neighbours=True),
)
