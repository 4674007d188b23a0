"""The golden checkpoints, read by hand: independent of `dijiang_model.checkpoints.checkpoint`, which has to agree."""

import json
from dataclasses import dataclass
from math import log
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dijiang_model.config import AttentionConfig, FeatureConfig, ModelConfig

FOLDER = Path(__file__).parents[2] / "golden"
NAMES = ("aligned", "straddling", "sign_flips")


@dataclass(frozen=True, slots=True)
class Golden:
    """One checkpoint and what the released forward pass computes on it in float64.

    Attributes:
        tensors: under our names, fp32 (the decay, which the released files do not hold, fp64).
        input_ids: [B, T]; hidden: L + 1 of [B, T, D]; logits: [B, T, vocab]; greedy_ids: [32].
    """

    path: Path
    config: ModelConfig
    tensors: dict[str, Tensor]
    input_ids: Tensor
    hidden: list[Tensor]
    logits: Tensor
    greedy_ids: list[int]


def load_golden(name: str) -> Golden:
    path = FOLDER / name
    config = _config(json.loads((path / "config.json").read_text()))
    expected = load_file(path / "expected.safetensors")
    return Golden(
        path=path,
        config=config,
        tensors=_tensors(path, config),
        input_ids=expected["input_ids"],
        hidden=[expected[f"hidden_{i}"] for i in range(config.num_layers + 1)],
        logits=expected["logits"],
        greedy_ids=expected["greedy_ids"][0].tolist(),
    )


def _config(raw: dict[str, int]) -> ModelConfig:
    num_heads, hidden_size = raw["num_attention_heads"], raw["hidden_size"]
    features = FeatureConfig(bases=("matrix",), normalisation="softmax", scale=1.0, nodes="checkpoint")
    layer = AttentionConfig(features=features, read_out="group_norm", decay="table")
    return ModelConfig(
        family="gpt_neox",
        vocab_size=raw["vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=raw["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=hidden_size // num_heads,
        rotary_dims=int(hidden_size // num_heads * raw["rotary_pct"]),
        rope_theta=raw["rotary_emb_base"],
        max_position_embeddings=raw["max_position_embeddings"],
        norm_eps=raw["layer_norm_eps"],
        activation=str(raw["hidden_act"]),
        parallel_residual=bool(raw["use_parallel_residual"]),
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        layers=(layer,) * raw["num_hidden_layers"],
        position_table_length=raw["max_position_embeddings"],
    )


def _tensors(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in torch.load(path / "pytorch_model.bin", weights_only=True).items():
        head, _, last = name.rpartition(".")
        if last == "proj_matrix":
            renamed[f"{head}.linear.projection"] = tensor
        elif last == "W_G":
            renamed[f"{head}.gate.weight"] = tensor.T.contiguous()
        elif last in ("D1", "D2"):
            renamed[f"{head}.linear.{'read' if last == 'D1' else 'write'}_table"] = tensor[0, :, :, 0].contiguous()
        else:
            renamed[name] = tensor
    gamma = 1 - torch.linspace(log(1 / 32), log(1 / 512), config.num_heads, dtype=torch.float64).exp()
    for index in range(config.num_layers):
        renamed[f"gpt_neox.layers.{index}.attention.linear.log_decay"] = gamma.log()
    return renamed
