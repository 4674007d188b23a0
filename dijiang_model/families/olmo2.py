"""OLMo 2: LLaMA's network with norms behind attention and MLP, none before, and one over all heads' queries or keys."""

from dataclasses import replace

import torch
from torch import nn

from dijiang_model.attention import DiJiangAttention
from dijiang_model.config import ModelConfig
from dijiang_model.families.family import Gguf
from dijiang_model.families.llama import (
    LLAMA,
    PATHS,
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    llama_document,
    read_llama_like,
)
from dijiang_model.families.parts import RMSNorm
from dijiang_model.formats.json_fields import Fields
from dijiang_model.ops import AttentionOp, LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.residual import Residual

DEFAULT_NORM_EPS, DEFAULT_EOS, DEFAULT_PAD = 1e-5, 50_279, 1


class Olmo2Block(nn.Module):
    """Attention, then MLP, each with a norm of what it adds."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.mlp = LlamaMLP(config, dtype=dtype)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)

    @property
    def dijiang(self) -> DiJiangAttention:
        return self.self_attn

    def forward(self, x: Residual, *, op: AttentionOp, layout: StepLayout, state: LayerState) -> Residual:
        hidden = x.value
        hidden = hidden + self.post_attention_layernorm(self.self_attn(hidden, op=op, layout=layout, state=state))
        return Residual(hidden, self.post_feedforward_layernorm(self.mlp(hidden)))


class Olmo2ForCausalLM(LlamaForCausalLM):
    """The family's modules under their checkpoint names; `lm_head` is absent when tied."""

    paths = replace(
        PATHS,
        input_norm=None,
        mlp_norm=None,
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        attention_output_norm="post_attention_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
    )
    block = Olmo2Block


def _olmo2(fields: Fields) -> ModelConfig:
    config = read_llama_like(
        fields,
        family="olmo2",
        attention_bias=fields.boolean("attention_bias", False),
        qk_norm=True,
        default_norm_eps=DEFAULT_NORM_EPS,
        default_token_ids=(None, DEFAULT_EOS if fields.integer("vocab_size") > DEFAULT_EOS else None),
    )
    return replace(config, norms_all_heads=True)


OLMO2 = replace(
    LLAMA,
    name="olmo2",
    network=Olmo2ForCausalLM,
    paths=Olmo2ForCausalLM.paths,
    read_config=_olmo2,
    write_config=llama_document,
    gguf=Gguf("olmo2"),
)
