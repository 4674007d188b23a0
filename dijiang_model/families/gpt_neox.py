"""GPT-NeoX (Pythia): LayerNorm, partial rotary embedding, parallel or sequential residual."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dijiang_model.attention import DiJiangAttention
from dijiang_model.config import ModelConfig
from dijiang_model.families.config_fields import common_config, head_size_of, read_rope, rope_document
from dijiang_model.families.family import Family
from dijiang_model.families.parts import ACTIVATIONS, empty_embedding
from dijiang_model.formats.json_fields import Fields
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import AttentionOp, LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.residual import Residual
from dijiang_model.ops.selection import two_norms
from dijiang_model.paths import Paths
from dijiang_model.quantization.weight import QuantizedWeight

PATHS = Paths(
    embedding="gpt_neox.embed_in",
    head="embed_out",
    final_norm="gpt_neox.final_layer_norm",
    layers="gpt_neox.layers",
    attention="attention",
    input_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    query="attention.query_key_value",
    output="attention.dense",
    mlp_up="mlp.dense_h_to_4h",
    mlp_down="mlp.dense_4h_to_h",
)


class GPTNeoXAttention(DiJiangAttention):
    """One fused projection, interleaved per head: [H, 3, d]."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__(config, layer, dtype=dtype)
        hidden, bias = config.hidden_size, config.attention_bias
        heads = config.num_heads * config.head_size
        self.query_key_value = nn.Linear(hidden, 3 * heads, bias=bias, dtype=dtype)
        self.dense = nn.Linear(heads, hidden, bias=bias, dtype=dtype)

    def forward(self, x: Tensor, *, op: AttentionOp, layout: StepLayout, state: LayerState) -> Tensor:
        fused = self.query_key_value(x).unflatten(1, (self.config.num_heads, 3, self.config.head_size))
        q, k, v = fused.unbind(2)
        output: Tensor = self.dense(self.attend(x, q, k, v, op=op, layout=layout, state=state))
        return output


class GPTNeoXMLP(nn.Module):
    """Two projections around the activation."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, dtype=dtype)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x)))
        return output


class GPTNeoXBlock(nn.Module):
    """Attention and MLP on the layer's input (parallel) or one after the other."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.is_parallel = config.parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.attention = GPTNeoXAttention(config, layer, dtype=dtype)
        self.mlp = GPTNeoXMLP(config, dtype=dtype)

    @property
    def dijiang(self) -> DiJiangAttention:
        return self.attention

    def forward(self, x: Residual, *, op: AttentionOp, layout: StepLayout, state: LayerState) -> Residual:
        if self.is_parallel:
            x = Residual(x.value)
            normed, mlp_input = two_norms(x.total, self.input_layernorm, self.post_attention_layernorm)
            return x.plus(self.attention(normed, op=op, layout=layout, state=state)).plus(self.mlp(mlp_input))
        x, normed = x.normed(self.input_layernorm)
        x = x.plus(self.attention(normed, op=op, layout=layout, state=state))
        x, normed = x.normed(self.post_attention_layernorm)
        return x.plus(self.mlp(normed))


class GPTNeoXBackbone(nn.Module):
    """Embedding, blocks and final norm, under HF's prefix `gpt_neox`."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_in = empty_embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(GPTNeoXBlock(config, i, dtype=dtype) for i in range(config.num_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)


class GPTNeoXForCausalLM(DiJiangForCausalLM):
    """The family's modules under their checkpoint names; `embed_out` is absent when tied."""

    paths = PATHS

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__(config)
        self.gpt_neox = GPTNeoXBackbone(config, dtype=dtype)
        if not config.tie_word_embeddings:
            self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        self.is_tied = config.tie_word_embeddings

    @property
    def blocks(self) -> nn.ModuleList:
        return self.gpt_neox.layers

    @property
    def head(self) -> Tensor | QuantizedWeight:
        """[vocab, D]."""
        return self.gpt_neox.embed_in.weight if self.is_tied else self.embed_out.weight

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = self.gpt_neox.embed_in(token_ids)
        return x

    def finish(self, x: Residual) -> Tensor:
        return x.normed(self.gpt_neox.final_layer_norm)[1]


def _gpt_neox(fields: Fields) -> ModelConfig:
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    head_size = head_size_of(fields, hidden_size, num_heads)
    rope = read_rope(fields, theta_name="rotary_emb_base", factor_name="rotary_pct", default_factor=0.25)
    return common_config(
        fields,
        family="gpt_neox",
        num_kv_heads=num_heads,
        head_size=head_size,
        rotary_dims=int(head_size * rope.share),
        rope=rope,
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        activation=fields.text("hidden_act", "gelu", choices=ACTIVATIONS),
        parallel_residual=fields.boolean("use_parallel_residual", True),
        attention_bias=fields.boolean("attention_bias", True),
        mlp_bias=True,
        default_token_ids=(0, 2),
    )


def _document(config: ModelConfig) -> Mapping[str, object]:
    return {
        "layer_norm_eps": config.norm_eps,
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": config.rotary_dims / config.head_size,
        "use_parallel_residual": config.parallel_residual,
        **rope_document(config),
    }


GPT_NEOX = Family(
    name="gpt_neox",
    network=GPTNeoXForCausalLM,
    paths=PATHS,
    read_config=_gpt_neox,
    write_config=_document,
    buffers=re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"),
)
