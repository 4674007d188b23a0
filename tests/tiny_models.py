"""Tiny random models of every kind we serve, in memory and as folders, with a byte tokenizer."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dijiang_model.checkpoints.config_json import Origin, StoredConfig, base_document, stored_config_text
from dijiang_model.config import AnchorConfig, AttentionConfig, FeatureConfig, LocalLayers, ModelConfig
from dijiang_model.families import build_model
from dijiang_model.features import node_radii
from dijiang_model.kernel import released_log_decay
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.rotary import RopeScaling
from dijiang_model.serving.network import FrozenModel, freeze
from tests.byte_tokenizer import write_byte_tokenizer

BYTE_VOCAB_SIZE = 260
"""256 bytes, then <|endoftext|>, <|im_start|>, <|im_end|> and one unused id."""
EOS_TOKEN_ID = 258

HYBRID = AttentionConfig(features=FeatureConfig(scale=16**-0.25), window=5, sinks=2)
NO_LINEAR = replace(HYBRID, features=replace(HYBRID.features, width=0))
CONSTANT = replace(HYBRID, features=replace(HYBRID.features, width=1, rotated=False))
"""One feature: a decayed mean."""
PURE = AttentionConfig(features=FeatureConfig(scale=16**-0.25))
RELEASED = AttentionConfig(features=FeatureConfig(bases=("matrix",), nodes="checkpoint"), read_out="group_norm")
TABLES = replace(RELEASED, decay="table")


def anchored(
    num_kv_heads: int,
    *,
    base: AttentionConfig = HYBRID,
    places: tuple[int, ...] = (13, 7, 24),
    windows: tuple[int, ...] = (4, 5, 7),
    value_bits: int = 8,
) -> AttentionConfig:
    """A hybrid with places of unequal number in each head; one head of several has no anchors."""
    places = tuple(places[head % len(places)] for head in range(num_kv_heads))
    windows = tuple(windows[head % len(windows)] for head in range(num_kv_heads))
    return replace(base, window=max(windows), anchors=AnchorConfig(places, windows, age=0.02, value_bits=value_bits))


def llama_config(*layers: AttentionConfig, num_heads: int = 4, num_kv_heads: int = 2) -> ModelConfig:
    """Two layers of grouped-query heads by default (hybrid, then pure with two bases)."""
    wide = replace(PURE, features=replace(PURE.features, bases=("dct2", "dct4")))
    return ModelConfig(
        family="llama",
        vocab_size=BYTE_VOCAB_SIZE,
        hidden_size=num_heads * 16,
        intermediate_size=96,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=16,
        rotary_dims=16,
        rope_theta=10_000.0,
        max_position_embeddings=128,
        norm_eps=1e-5,
        activation="silu",
        parallel_residual=False,
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=True,
        layers=layers or (HYBRID, wide),
        bos_token_id=257,
        eos_token_ids=(EOS_TOKEN_ID,),
    )


def qwen2_config(*layers: AttentionConfig) -> ModelConfig:
    """LLaMA's with biases on queries, keys and values alone."""
    return replace(llama_config(*layers), family="qwen2", attention_bias=True, output_bias=False)


def qwen3_config(*layers: AttentionConfig) -> ModelConfig:
    """LLaMA's with normed queries and keys, and heads that are wider than their share of the hidden size."""
    wider = replace(llama_config(*layers), family="qwen3", qk_norm=True, hidden_size=48)
    scaling = RopeScaling("yarn", 4.0, 64, 1.0, 32.0, attention_factor=1.1)
    return replace(wider, rope_scaling=scaling)


def gemma3_config(*layers: AttentionConfig) -> ModelConfig:
    """A local layer with a window of 7, then one that sees everything; norms behind, queries and embedding scaled."""
    local = replace(HYBRID, window=7, sinks=0)
    return replace(
        llama_config(*(layers or (local, HYBRID))),
        family="gemma3_text",
        activation="gelu_pytorch_tanh",
        rope_theta=1_000_000.0,
        qk_norm=True,
        local_layers=LocalLayers((0,), 7, 10_000.0),
        query_scale=0.9,
        embedding_scale=8.0,
        norm_offset=1.0,
    )


def olmo2_config(*layers: AttentionConfig) -> ModelConfig:
    """Norms behind attention and MLP, none before, and one of all heads' queries or keys together."""
    return replace(llama_config(*layers), family="olmo2", qk_norm=True, norms_all_heads=True)


def gpt_neox_config(*layers: AttentionConfig, parallel_residual: bool = True) -> ModelConfig:
    """Two layers with the released read-out and position tables by default."""
    return ModelConfig(
        family="gpt_neox",
        vocab_size=BYTE_VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=96,
        num_heads=3,
        num_kv_heads=3,
        head_size=16,
        rotary_dims=4,
        rope_theta=10_000.0,
        max_position_embeddings=64,
        norm_eps=1e-5,
        activation="gelu",
        parallel_residual=parallel_residual,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        layers=layers or (TABLES, TABLES),
        position_table_length=64,
        bos_token_id=256,
        eos_token_ids=(256,),
    )


def opt_config(*layers: AttentionConfig, pre_norm: bool = True, embedding_size: int = 0) -> ModelConfig:
    """Two layers (hybrid, then pure); OPT-350M's form is `pre_norm=False` with an embedding_size of its own."""
    return ModelConfig(
        family="opt",
        vocab_size=BYTE_VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=96,
        num_heads=3,
        num_kv_heads=3,
        head_size=16,
        rotary_dims=0,
        rope_theta=10_000.0,
        max_position_embeddings=128,
        norm_eps=1e-5,
        activation="relu",
        parallel_residual=False,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        layers=layers or (HYBRID, PURE),
        pre_norm=pre_norm,
        embedding_size=embedding_size,
        bos_token_id=256,
        eos_token_ids=(256,),
    )


def random_tensors(config: ModelConfig, *, seed: int = 0) -> dict[str, Tensor]:
    """fp32 checkpoint tensors with every part at work (no silent mixing weight, weights and tables as if trained)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in build_model(config).state_dict().items():
        noise = torch.randn(parameter.shape, generator=generator)
        tensors[name] = _initial(name, noise, config)
    return tensors


def _initial(name: str, noise: Tensor, config: ModelConfig) -> Tensor:
    kind = name.rsplit(".", 1)[-1]
    if kind == "nodes":
        return (node_radii("midpoint", noise.shape[1]).float() + 0.1 * noise).contiguous()
    if kind == "projection":
        return noise
    if kind == "log_decay":
        return released_log_decay(len(noise)).float() if config.family == "gpt_neox" else -(noise.abs() * 0.1 + 0.01)
    if kind in ("read_table", "write_table"):
        steps = torch.arange(noise.shape[1]) * released_log_decay(len(noise)).float()[:, None]
        return (steps if kind == "read_table" else -steps).exp() * (1 + 0.05 * noise)
    if kind in ("log_weights", "mix_bias", "mix_weight"):
        return 0.3 * noise - (2.0 if kind == "mix_bias" else 0.0)
    if "norm" in name:
        return 0.1 * noise + (1.0 if kind == "weight" else 0.0)
    return 0.1 * noise if kind == "bias" else noise * noise.shape[-1] ** -0.5


def tiny_model(
    config: ModelConfig | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> DiJiangForCausalLM:
    """A ready model on the CPU; the hybrid LLaMA of `llama_config()` by default."""
    config = llama_config() if config is None else config
    model = build_model(config, dtype=dtype)
    wanted = model.state_dict()
    tensors = {name: tensor.to(wanted[name].dtype) for name, tensor in random_tensors(config, seed=seed).items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.prepare()


def tiny_network(
    config: ModelConfig | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32, native: bool = True
) -> FrozenModel:
    """The same model as `tiny_model`, as an engine runs it; `native`: in the compiled kernels, where they can."""
    return freeze(tiny_model(config, seed=seed, dtype=dtype), native=native)


def write_tiny_model(
    folder: Path, config: ModelConfig | None = None, *, seed: int = 0, with_tokenizer: bool = True
) -> Path:
    """The same model as `tiny_model`, as a folder in our own format."""
    config = llama_config() if config is None else config
    folder.mkdir(parents=True, exist_ok=True)
    stored = StoredConfig(config=config, base=base_document(config), origin=Origin(recipe="hybrid", teacher="random"))
    (folder / "config.json").write_text(stored_config_text(stored))
    save_file(random_tensors(config, seed=seed), folder / "model.safetensors")
    if with_tokenizer:
        write_byte_tokenizer(folder)
    return folder
