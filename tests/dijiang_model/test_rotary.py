"""Rotary frequencies: those of transformers for every kind of scaling, and the same in every part of the code."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dijiang_model.checkpoints.config_json import base_document
from dijiang_model.checkpoints.hf_config import base_model_config

SCALINGS: dict[str, dict[str, object]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama 3.1": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama 3.2": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn, given": {
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "beta_fast": 24.0,
        "beta_slow": 2.0, "attention_factor": 0.9, "truncate": False,
    },
    "yarn, mscale": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
        "mscale_all_dim": 0.707,
    },
}  # fmt: skip


@pytest.mark.parametrize("head_size", [64, 128, 80])
@pytest.mark.parametrize("kind", SCALINGS)
def test_frequencies_and_factor_are_those_of_transformers(kind: str, head_size: int) -> None:
    scaling = SCALINGS[kind]
    theirs = LlamaConfig(
        hidden_size=4 * head_size, num_attention_heads=4, intermediate_size=8, num_hidden_layers=1,
        max_position_embeddings=131072, rope_parameters={**scaling, "rope_theta": 500_000.0},
    )  # fmt: skip
    expected, factor = ROPE_INIT_FUNCTIONS[str(scaling["rope_type"])](theirs, torch.device("cpu"))
    config = base_model_config(theirs.to_dict())
    torch.testing.assert_close(torch.tensor(config.frequencies), expected, rtol=2e-6, atol=0)
    assert config.rope_scaling is not None
    assert config.rope_scaling.attention_factor == pytest.approx(factor)
    assert base_model_config(base_document(config)) == config
