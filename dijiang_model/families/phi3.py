"""Phi-3 and Phi-4: LLaMA's network, stored with fused projections; some releases see a sliding window only."""

from dataclasses import replace

from dijiang_model.config import ModelConfig
from dijiang_model.families.family import Fused, Gguf, Metadata
from dijiang_model.families.llama import LLAMA, PATHS, llama_document, read_llama_like
from dijiang_model.formats.json_fields import Fields


def _phi3(fields: Fields) -> ModelConfig:
    return read_llama_like(
        fields,
        family="phi3",
        attention_bias=False,
        teacher_window=fields.integer("sliding_window", 0, minimum=0),
        rotates_in_part=True,
        default_token_ids=(1, 32_000),
    )


def _document(config: ModelConfig) -> dict[str, object]:
    return {
        **llama_document(config),
        "sliding_window": config.teacher_window or None,
        "partial_rotary_factor": config.rotary_dims / config.head_size,
    }


def _gguf_config(value: Metadata) -> dict[str, object]:
    head_size = value("embedding_length") // max(value("attention.head_count"), 1)
    return {
        "sliding_window": value("attention.sliding_window", 0) or None,
        "partial_rotary_factor": value("rope.dimension_count", head_size) / head_size,
    }


def _query_key_value_rows(config: ModelConfig) -> tuple[int, ...]:
    keys = config.num_kv_heads * config.head_size
    return config.num_heads * config.head_size, keys, keys


assert PATHS.key is not None
assert PATHS.value is not None
assert PATHS.mlp_gate is not None
PHI3 = replace(
    LLAMA,
    name="phi3",
    read_config=_phi3,
    write_config=_document,
    sliding_window="read",
    gguf=Gguf("phi3", config=_gguf_config),
    fused=(
        Fused("self_attn.qkv_proj", "attn_qkv", (PATHS.query, PATHS.key, PATHS.value), _query_key_value_rows),
        Fused(
            "mlp.gate_up_proj", "ffn_up", (PATHS.mlp_gate, PATHS.mlp_up), lambda config: (config.intermediate_size,) * 2
        ),
    ),
)
