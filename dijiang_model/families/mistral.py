"""Mistral: LLaMA's network, of which some releases see a sliding window only; its GGUF files are of LLaMA's kind."""

from dataclasses import replace

from dijiang_model.config import ModelConfig
from dijiang_model.families.llama import LLAMA, llama_document, read_llama_like
from dijiang_model.formats.json_fields import Fields

DEFAULT_WINDOW = 4096
"""Of a config that says nothing; null is none."""


def _mistral(fields: Fields) -> ModelConfig:
    window = 0
    if "sliding_window" in fields or "sliding_window" not in fields.names():
        window = fields.integer("sliding_window", DEFAULT_WINDOW)
    return read_llama_like(
        fields, family="mistral", attention_bias=False, teacher_window=window, default_token_ids=(1, 2)
    )


MISTRAL = replace(
    LLAMA,
    name="mistral",
    read_config=_mistral,
    write_config=lambda config: {**llama_document(config), "sliding_window": config.teacher_window or None},
    sliding_window="read",
    gguf=None,
)
