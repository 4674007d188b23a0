"""Qwen3: LLaMA's network with heads of a size of their own, whose queries and keys are normed one by one."""

from dataclasses import replace

from dijiang_model.config import ModelConfig
from dijiang_model.families.family import Gguf
from dijiang_model.families.llama import LLAMA, PATHS, LlamaForCausalLM, llama_document, read_llama_like
from dijiang_model.formats.json_fields import Fields

DEFAULT_HEAD_SIZE = 128


class Qwen3ForCausalLM(LlamaForCausalLM):
    """LLaMA's modules, and a norm of queries and one of keys in each attention."""

    paths = replace(PATHS, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")


def _qwen3(fields: Fields) -> ModelConfig:
    return read_llama_like(
        fields,
        family="qwen3",
        attention_bias=fields.boolean("attention_bias", False),
        qk_norm=True,
        default_head_size=DEFAULT_HEAD_SIZE,
    )


QWEN3 = replace(
    LLAMA,
    name="qwen3",
    network=Qwen3ForCausalLM,
    paths=Qwen3ForCausalLM.paths,
    read_config=_qwen3,
    write_config=llama_document,
    sliding_window="switched",
    gguf=Gguf("qwen3"),
)
