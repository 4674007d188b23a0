"""Tiny random teachers in every form that the converter reads."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from tests.byte_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, _byte_vocabulary, write_byte_tokenizer

VOCAB_SIZE = 260
GGUF_QUANTIZED = ("attn_q", "attn_k", "ffn_gate")


def llama_teacher(**changes: object) -> PreTrainedModel:
    """Grouped heads, tied embeddings, larger weights than HF's initialisation so that attention matters."""
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**values | changes)).eval()


def gpt_neox_teacher(**changes: object) -> PreTrainedModel:
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "rotary_pct": 0.25,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**values | changes)).eval()


def opt_teacher(**changes: object) -> PreTrainedModel:
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 48,
        "init_std": 0.1,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(**values | changes)).eval()


def save_teacher(model: PreTrainedModel, folder: Path, *, max_shard_size: str = "1GB") -> Path:
    """An HF folder with the byte tokenizer."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_byte_tokenizer(folder)
    return folder


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    is_quantized: bool = False,
    pre_tokenizer: str | None = "gpt-2",
    metadata: dict[str, str | int | float] | None = None,
    architecture: str = "llama",
    rope_factors: np.ndarray | None = None,
    add_vocabulary: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """A teacher of LLaMA's kind as llama.cpp stores it: its names, its order of q and k rows, optionally quantized."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny LLaMA")
    writer.add_license("mit")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type == "phi3":
        head_size = config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(head_size * rope.get("partial_rotary_factor", 1.0)))
    if config.model_type in ("phi3", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window or 0)
    if getattr(config, "head_dim", None) is not None:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    if pre_tokenizer is not None:
        _add_tokenizer(writer, pre_tokenizer)
    add_vocabulary(writer)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            _add_tensor(writer, name, tensor.float(), config, is_quantized=is_quantized, architecture=architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: str | int | float) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, pre_tokenizer: str) -> None:
    vocabulary = _byte_vocabulary()
    special = SPECIAL_TOKENS[:3]
    tokens = [*sorted(vocabulary, key=lambda symbol: vocabulary[symbol]), *special, "Ġt"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(vocabulary) + [3] * len(special) + [1])
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_eot_token_id(256)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    tensor: torch.Tensor,
    config: LlamaConfig,
    *,
    is_quantized: bool,
    architecture: str,
) -> None:
    gguf_name = _gguf_name(name, has_output_norms=architecture in ("gemma3", "olmo2"))
    is_interleaved = architecture == "llama"
    if architecture == "gemma3" and name.endswith("norm.weight"):
        tensor = tensor + 1
    if is_interleaved and ".q_proj." in name:
        tensor = _interleaved(tensor, config.num_attention_heads)
    if is_interleaved and ".k_proj." in name:
        tensor = _interleaved(tensor, config.num_key_value_heads)
    array = tensor.contiguous().numpy()
    if is_quantized and gguf_name.split(".")[-2] in GGUF_QUANTIZED:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(gguf_name, gguf.quantize(array, kind), raw_dtype=kind)
    else:
        writer.add_tensor(gguf_name, np.ascontiguousarray(array))


def _interleaved(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp's order of rows: the halves of each head alternate."""
    return tensor.reshape(num_heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _gguf_name(name: str, *, has_output_norms: bool) -> str:
    for hf, ours in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "self_attn.qkv_proj": "attn_qkv",
        "mlp.gate_up_proj": "ffn_up",
        "input_layernorm": "attn_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "post_attention_layernorm": "post_attention_norm" if has_output_norms else "ffn_norm",
    }.items():
        name = name.replace(hf, ours)
    return name
