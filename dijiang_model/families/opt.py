"""OPT: learned positions, biases everywhere, pre-norm or (350M) post-norm with embedding projections."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dijiang_model.attention import DiJiangAttention
from dijiang_model.config import ModelConfig
from dijiang_model.families.config_fields import DEFAULT_THETA, Rope, common_config, head_size_of
from dijiang_model.families.family import Family
from dijiang_model.families.parts import ACTIVATIONS, empty_embedding
from dijiang_model.formats.json_fields import Fields
from dijiang_model.merged import products
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import AttentionOp, LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.residual import Residual
from dijiang_model.paths import Paths
from dijiang_model.quantization.weight import QuantizedWeight

POSITION_OFFSET = 2
"""OPT's first token has position row 2."""


PATHS = Paths(
    embedding="model.decoder.embed_tokens",
    head="lm_head",
    final_norm="model.decoder.final_layer_norm",
    layers="model.decoder.layers",
    attention="self_attn",
    input_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    mlp_up="fc1",
    mlp_down="fc2",
)


class OPTAttention(DiJiangAttention):
    """Separate q, k, v and output projections; no rotary embedding."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__(config, layer, dtype=dtype)
        hidden, bias = config.hidden_size, config.attention_bias
        heads = config.num_heads * config.head_size
        self.q_proj = nn.Linear(hidden, heads, bias=bias, dtype=dtype)
        self.k_proj = nn.Linear(hidden, heads, bias=bias, dtype=dtype)
        self.v_proj = nn.Linear(hidden, heads, bias=bias, dtype=dtype)
        self.out_proj = nn.Linear(heads, hidden, bias=bias, dtype=dtype)

    def forward(self, x: Tensor, *, op: AttentionOp, layout: StepLayout, state: LayerState) -> Tensor:
        heads = (-1, self.config.head_size)
        q, k, v = (one.unflatten(1, heads) for one in products(x, self.q_proj, self.k_proj, self.v_proj))
        output: Tensor = self.out_proj(self.attend(x, q, k, v, op=op, layout=layout, state=state))
        return output


class OPTBlock(nn.Module):
    """Attention, then MLP; each normed before (pre-norm) or after its residual (post-norm)."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.is_pre_norm = config.pre_norm
        self.activation = ACTIVATIONS[config.activation]
        self.self_attn = OPTAttention(config, layer, dtype=dtype)
        self.self_attn_layer_norm = nn.LayerNorm(hidden, eps=config.norm_eps, dtype=dtype)
        self.fc1 = nn.Linear(hidden, inner, bias=bias, dtype=dtype)
        self.fc2 = nn.Linear(inner, hidden, bias=bias, dtype=dtype)
        self.final_layer_norm = nn.LayerNorm(hidden, eps=config.norm_eps, dtype=dtype)

    @property
    def dijiang(self) -> DiJiangAttention:
        return self.self_attn

    def forward(self, x: Residual, *, op: AttentionOp, layout: StepLayout, state: LayerState) -> Residual:
        if self.is_pre_norm:
            x, normed = x.normed(self.self_attn_layer_norm)
            x = x.plus(self.self_attn(normed, op=op, layout=layout, state=state))
            x, normed = x.normed(self.final_layer_norm)
            return x.plus(self._mlp(normed))
        x = x.plus(self.self_attn(x.value, op=op, layout=layout, state=state))
        x = Residual(x.normed(self.self_attn_layer_norm)[1])
        return Residual(x.plus(self._mlp(x.total)).normed(self.final_layer_norm)[1])

    def _mlp(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc2(self.activation(self.fc1(x)))
        return output


class OPTDecoder(nn.Module):
    """Embeddings, blocks, and what follows them, under HF's prefix `model.decoder`."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = empty_embedding(config.vocab_size, config.embedding_width, dtype=dtype)
        num_positions = config.max_position_embeddings + POSITION_OFFSET
        self.embed_positions = empty_embedding(num_positions, config.hidden_size, dtype=dtype)
        if config.embedding_width != config.hidden_size:
            self.project_in = nn.Linear(config.embedding_width, config.hidden_size, bias=False, dtype=dtype)
            self.project_out = nn.Linear(config.hidden_size, config.embedding_width, bias=False, dtype=dtype)
        self.layers = nn.ModuleList(OPTBlock(config, i, dtype=dtype) for i in range(config.num_layers))
        if config.pre_norm:
            self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)


class OPTBackbone(nn.Module):
    """HF's `model`."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.decoder = OPTDecoder(config, dtype=dtype)


class OPTForCausalLM(DiJiangForCausalLM):
    """The family's modules under their checkpoint names; `lm_head` is absent when tied.

    Past the learned positions the last one is used, so that generation has no end; what lies beyond the
    teacher's range is untrained there.
    """

    paths = PATHS
    learns_positions = True

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__(config)
        self.model = OPTBackbone(config, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.embedding_width, config.vocab_size, bias=False, dtype=dtype)
        self.is_tied = config.tie_word_embeddings

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.decoder.layers

    @property
    def head(self) -> Tensor | QuantizedWeight:
        """[vocab, embedding width]."""
        return self.model.decoder.embed_tokens.weight if self.is_tied else self.lm_head.weight

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        decoder, config = self.model.decoder, self.config
        x = decoder.embed_tokens(token_ids)
        if config.embedding_width != config.hidden_size:
            x = decoder.project_in(x)
        rows = positions.clamp(max=config.max_position_embeddings - 1) + POSITION_OFFSET
        output: Tensor = x + decoder.embed_positions(rows)
        return output

    def finish(self, x: Residual) -> Tensor:
        decoder, config = self.model.decoder, self.config
        finished: Tensor = x.normed(decoder.final_layer_norm)[1] if config.pre_norm else x.value
        if config.embedding_width != config.hidden_size:
            finished = decoder.project_out(finished)
        return finished


def _opt(fields: Fields) -> ModelConfig:
    hidden_size = fields.integer("hidden_size")
    pre_norm = fields.boolean("do_layer_norm_before", True)
    if pre_norm and fields.boolean("_remove_final_layer_norm", False):
        fields.report("_remove_final_layer_norm with do_layer_norm_before is not supported")
    if not fields.boolean("layer_norm_elementwise_affine", True):
        fields.report("layer_norm_elementwise_affine false is not supported")
    num_heads = fields.integer("num_attention_heads")
    has_bias = fields.boolean("enable_bias", True)
    embedding_size = fields.integer("word_embed_proj_dim", hidden_size)
    return common_config(
        fields,
        family="opt",
        intermediate_name="ffn_dim",
        num_kv_heads=num_heads,
        head_size=head_size_of(fields, hidden_size, num_heads),
        rotary_dims=0,
        rotates=False,
        rope=Rope(DEFAULT_THETA, 0.0, None),
        norm_eps=1e-5,
        activation=fields.text("activation_function", "relu", choices=ACTIVATIONS),
        parallel_residual=False,
        attention_bias=has_bias,
        mlp_bias=has_bias,
        is_tied_by_default=True,
        default_token_ids=(2, 2),
        pre_norm=pre_norm,
        embedding_size=embedding_size if embedding_size != hidden_size else 0,
    )


def _document(config: ModelConfig) -> Mapping[str, object]:
    return {
        "ffn_dim": config.intermediate_size,
        "activation_function": config.activation,
        "do_layer_norm_before": config.pre_norm,
        "word_embed_proj_dim": config.embedding_width,
        "enable_bias": config.attention_bias,
    }


OPT = Family(
    name="opt",
    network=OPTForCausalLM,
    paths=PATHS,
    read_config=_opt,
    write_config=_document,
    buffers=re.compile(r"model\.decoder\.version"),
)
