"""Qwen2 and Qwen2.5: LLaMA's network with biases on queries, keys and values."""

from dataclasses import replace

from dijiang_model.config import ModelConfig
from dijiang_model.families.family import Gguf
from dijiang_model.families.llama import LLAMA, llama_document, read_llama_like
from dijiang_model.formats.json_fields import Fields


def _qwen2(fields: Fields) -> ModelConfig:
    return read_llama_like(fields, family="qwen2", attention_bias=True, output_bias=False)


QWEN2 = replace(
    LLAMA,
    name="qwen2",
    read_config=_qwen2,
    write_config=llama_document,
    sliding_window="switched",
    gguf=Gguf("qwen2"),
)
