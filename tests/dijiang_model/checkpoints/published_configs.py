"""The `config.json` of each of the paper's models as their authors published it, and tiny models of the same structure.

What decides the function is kept: head size, rotary share and base, heads to a key-value head, norms and their epsilon,
residuals, biases, tied or untied embeddings, activation, embedding projections. Only counts shrink: layers, heads,
vocabulary, positions, and with the heads the widths.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.byte_tokenizer import write_byte_tokenizer

Json = Mapping[str, object]

VOCAB_SIZE = 260
MAX_POSITIONS = 128


def _pythia(hidden: int, heads: int, layers: int) -> Json:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": 4 * hidden,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.24.0",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    }


def _opt(hidden: int, heads: int, layers: int, *, pre_norm: bool, embedding: int) -> Json:
    return {
        "_remove_final_layer_norm": False,
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "do_layer_norm_before": pre_norm,
        "dropout": 0.1,
        "eos_token_id": 2,
        "ffn_dim": 4 * hidden,
        "hidden_size": hidden,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "max_position_embeddings": 2048,
        "model_type": "opt",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "prefix": "</s>",
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": 50272,
        "word_embed_proj_dim": embedding,
    }


def _llama(
    hidden: int,
    inner: int,
    *,
    heads: int,
    groups: int,
    layers: int,
    positions: int,
    vocab: int = 32000,
    **changes: object,
) -> Json:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": groups,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": vocab,
    } | changes


def _mistral(**changes: object) -> Json:
    common = _llama(4096, 14336, heads=32, groups=8, layers=32, positions=32768)
    dropped = ("attention_bias", "pretraining_tp", "rope_scaling")
    document = {name: value for name, value in common.items() if name not in dropped}
    return document | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"} | changes


def _qwen2(hidden: int, inner: int, *, heads: int, groups: int, layers: int, **changes: object) -> Json:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": groups,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    } | changes


def _qwen3(hidden: int, inner: int, *, heads: int, groups: int, layers: int, **changes: object) -> Json:
    more = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128}
    changes = {"max_position_embeddings": 40960, "rope_scaling": None, "sliding_window": None} | changes
    return _qwen2(hidden, inner, heads=heads, groups=groups, layers=layers) | more | changes


def _phi3(hidden: int, inner: int, *, heads: int, groups: int, layers: int, **changes: object) -> Json:
    common = _llama(hidden, inner, heads=heads, groups=groups, layers=layers, positions=4096, vocab=32064)
    more = {
        "architectures": ["Phi3ForCausalLM"],
        "eos_token_id": 32000,
        "model_type": "phi3",
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "sliding_window": None,
    }
    return {name: value for name, value in common.items() if name != "pretraining_tp"} | more | changes


def _gemma3(hidden: int, inner: int, *, heads: int, groups: int, layers: int, **changes: object) -> Json:
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": groups,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 262144,
    } | changes


def _olmo2(hidden: int, inner: int, *, heads: int, groups: int, layers: int) -> Json:
    return {
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": 100257,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": 4096,
        "model_type": "olmo2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": groups,
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 100352,
    }


def _llama3(*, factor: float) -> Json:
    return {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


PUBLISHED: Mapping[str, Json] = {
    "pythia-70m": _pythia(512, 8, 6),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 16, 24),
    "pythia-1b": _pythia(2048, 8, 16),
    "pythia-2.8b": _pythia(2560, 32, 32),
    "opt-125m": _opt(768, 12, 12, pre_norm=True, embedding=768),
    "opt-350m": _opt(1024, 16, 24, pre_norm=False, embedding=512),
    "opt-1.3b": _opt(2048, 32, 24, pre_norm=True, embedding=2048),
    "tinyllama-1.1b": _llama(2048, 5632, heads=32, groups=4, layers=22, positions=2048),
    "llama-2-7b": _llama(4096, 11008, heads=32, groups=32, layers=32, positions=4096),
    "smollm2-135m": _llama(
        576,
        1536,
        heads=9,
        groups=3,
        layers=30,
        positions=8192,
        vocab=49152,
        rope_theta=100000,
        tie_word_embeddings=True,
        is_llama_config=True,
        rope_interleaved=False,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "smollm2-1.7b": _llama(
        2048, 8192, heads=32, groups=32, layers=24, positions=8192, vocab=49152,
        rope_theta=130000, tie_word_embeddings=True,
    ),
    "llama-3.1-8b": _llama(
        4096, 14336, heads=32, groups=8, layers=32, positions=131072, vocab=128256, rope_theta=500000.0, mlp_bias=False,
        bos_token_id=128000, eos_token_id=[128001, 128008, 128009], rope_scaling=_llama3(factor=8.0),
    ),
    "llama-3.2-1b": _llama(
        2048, 8192, heads=32, groups=8, layers=16, positions=131072, vocab=128256, rope_theta=500000.0, head_dim=64,
        bos_token_id=128000, eos_token_id=128001, rope_scaling=_llama3(factor=32.0), tie_word_embeddings=True,
    ),
    "vicuna-16k": _llama(
        4096, 11008, heads=32, groups=32, layers=32, positions=4096, rope_scaling={"factor": 4.0, "type": "linear"}
    ),
    "yarn-llama-2-7b": _llama(
        4096, 11008, heads=32, groups=32, layers=32, positions=65536,
        rope_scaling={"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn"},
    ),
    "mistral-7b-v0.1": _mistral(sliding_window=4096),
    "mistral-7b-v0.3": _mistral(sliding_window=None, rope_theta=1000000.0, vocab_size=32768),
    "qwen2.5-0.5b": _qwen2(896, 4864, heads=14, groups=2, layers=24, tie_word_embeddings=True),
    "qwen2.5-7b-1m": _qwen2(
        3584, 18944, heads=28, groups=4, layers=28,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    ),
    "phi-3-mini-4k": _phi3(3072, 8192, heads=32, groups=32, layers=32, sliding_window=2047),
    "phi-4": _phi3(
        5120, 17920, heads=40, groups=10, layers=40, vocab_size=100352, rope_theta=250000,
        max_position_embeddings=16384, bos_token_id=100257, eos_token_id=100257, pad_token_id=100257,
    ),
    "phi-4-mini, plain rotation": _phi3(
        3072, 8192, heads=24, groups=8, layers=32, partial_rotary_factor=0.75, tie_word_embeddings=True,
    ),
    "gemma-3-270m": _gemma3(640, 2048, heads=4, groups=1, layers=18, sliding_window=512),
    "gemma-3-1b": _gemma3(1152, 6912, heads=4, groups=1, layers=26, sliding_window=512),
    "gemma-3-27b, text": _gemma3(
        5376, 21504, heads=32, groups=16, layers=62, sliding_window=1024, head_dim=128, query_pre_attn_scalar=168,
        rope_scaling={"factor": 8.0, "rope_type": "linear"}, max_position_embeddings=131072,
    ),
    "olmo-2-7b": _olmo2(4096, 11008, heads=32, groups=32, layers=32),
    "olmo-2-32b": _olmo2(5120, 27648, heads=40, groups=8, layers=64),
    "qwen3-0.6b": _qwen3(1024, 3072, heads=16, groups=8, layers=28, tie_word_embeddings=True),
    "qwen3-8b": _qwen3(
        4096, 12288, heads=32, groups=8, layers=36,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "rope_type": "yarn"},
    ),
}  # fmt: skip


def shrunk(published: Json) -> Json:
    """The same structure with 2 layers and 2 key-value heads."""
    heads, hidden = _number(published, "num_attention_heads"), _number(published, "hidden_size")
    groups = int(str(published.get("num_key_value_heads", heads)))
    num_heads = 2 * heads // groups
    small: dict[str, object] = {
        "num_hidden_layers": 2,
        "num_attention_heads": num_heads,
        "hidden_size": num_heads * hidden // heads,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_POSITIONS,
    }
    if published["model_type"] == "opt":
        # Half as wide as the model where it is projected, as in the 350M.
        width = _number(small, "hidden_size")
        small |= {"ffn_dim": 96, "word_embed_proj_dim": width * _number(published, "word_embed_proj_dim") // hidden}
    else:
        small["intermediate_size"] = 96
    if "num_key_value_heads" in published:
        small["num_key_value_heads"] = 2
    if published["model_type"] == "gemma3_text":
        small |= {"sliding_window": MAX_POSITIONS // 4, "sliding_window_pattern": 2}
    scaling = published.get("rope_scaling")
    if isinstance(scaling, dict) and "original_max_position_embeddings" in scaling:
        # So that within a short text some channels are scaled, some are not, and some in part.
        small["rope_scaling"] = {**scaling, "original_max_position_embeddings": MAX_POSITIONS // 2}
    if published.get("sliding_window") is not None and published["model_type"] in ("mistral", "phi3"):
        small["sliding_window"] = MAX_POSITIONS // 4
    small |= {name: 0 for name in ("bos_token_id", "eos_token_id", "pad_token_id") if _is_beyond(published.get(name))}
    return {**published, **small}


def _is_beyond(token_ids: object) -> bool:
    values = token_ids if isinstance(token_ids, list) else [token_ids]
    return any(isinstance(value, int) and value >= VOCAB_SIZE for value in values)


def tiny_teacher(name: str) -> PreTrainedModel:
    """HF's network of a published model's structure, with random weights that leave nothing at its neutral value."""
    document = dict(shrunk(PUBLISHED[name]))
    config = AutoConfig.for_model(str(document.pop("model_type")), **document)
    teacher: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter_name, parameter in teacher.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + (1.0 if "norm" in parameter_name and "bias" not in parameter_name else 0))
            else:
                parameter.copy_(1.5 * noise * parameter.shape[-1] ** -0.5)
    return teacher


def save(teacher: PreTrainedModel, folder: Path, *, max_shard_size: str = "1GB") -> Path:
    """An HF folder with the byte tokenizer."""
    teacher.save_pretrained(folder, max_shard_size=max_shard_size)
    write_byte_tokenizer(folder)
    return folder


def _number(values: Json, name: str) -> int:
    value = values[name]
    assert isinstance(value, int)
    return value
