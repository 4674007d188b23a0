"""LLaMA (LLaMA-2, TinyLLaMA, SmolLM): RMSNorm, SwiGLU, grouped-query heads, sequential residual."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dijiang_model.attention import DiJiangAttention
from dijiang_model.config import ModelConfig
from dijiang_model.families.parts import ACTIVATIONS, empty_embedding
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import AttentionOp, LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.selection import gated_product, residual_norm
from dijiang_model.quantization.weight import QuantizedWeight


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

    ATTENTION_PATH = "model.layers.{layer}.self_attn"
    EMBEDDING_PATH = "model.embed_tokens"
    HEAD_PATH = "lm_head"

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
