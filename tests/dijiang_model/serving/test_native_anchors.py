"""Anchors with every kind of weights, and heads of real sizes: bit for bit the same however a text is fed."""

from dataclasses import replace

import pytest
import torch

from dijiang_model.checkpoints.quantized import quantize_
from dijiang_model.config import ModelConfig
from dijiang_model.native.library import load_library
from dijiang_model.quantization.config import Quantization
from dijiang_model.serving.network import FrozenModel, freeze
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, random_text
from tests.tiny_models import anchored, llama_config, qwen3_config, tiny_model

pytestmark = pytest.mark.skipif(load_library() is None, reason="the kernels were not built: no compiler at install")
CONFIG = llama_config(anchored(2), anchored(2))
WEIGHTS = ("float32", "bfloat16", "int8", "int4")


def network(weights: str) -> FrozenModel:
    if weights == "bfloat16":
        return freeze(tiny_model(CONFIG, dtype=torch.bfloat16))
    model = tiny_model(CONFIG)
    if weights != "float32":
        quantize_(model, Quantization(weights, group_size=32 if weights == "int4" else 0))  # type: ignore[arg-type]
    return freeze(model)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_text_leaves_the_same_places_in_any_cut_and_any_company(weights: str) -> None:
    model, text = network(weights), random_text(60)
    assert model.decode_path == "native"
    whole, cut, single = (Stepper(model).open(2, 5) for _ in range(3))
    logits = whole.step({2: text})[2]
    pieces = [cut.step({5: random_text(9), 2: text[:17]})[2], cut.step({2: text[17:41]}, decode={5: 3})[2]]
    pieces.append(cut.step({2: text[41:]})[2])
    tokens = [single.step(decode={5: i, 2: token}, num_padding=i % 2)[2] for i, token in enumerate(text)]
    assert torch.equal(torch.cat(pieces), logits)
    assert torch.equal(torch.cat(tokens), logits)
    for name, tensor in whole.state(2).items():
        assert torch.equal(cut.state(2)[name], tensor), name
        assert torch.equal(single.state(2)[name], tensor), name


@pytest.mark.parametrize(
    "config",
    [
        replace(llama_config(anchored(1, places=(150,)), num_heads=2, num_kv_heads=1), head_size=128, rotary_dims=128),
        replace(llama_config(anchored(2), num_heads=2, num_kv_heads=2), head_size=64, rotary_dims=64),
        replace(llama_config(anchored(2, value_bits=4), num_heads=2, num_kv_heads=2), head_size=64, rotary_dims=64),
        replace(llama_config(anchored(1, value_bits=4), num_heads=4, num_kv_heads=1), head_size=80, rotary_dims=80),
        qwen3_config(anchored(2)),
    ],
    ids=["heads of 128", "heads of 64", "values of 4 bits", "values of 4 bits, heads of 80", "normed queries and keys"],
)
def test_heads_of_real_sizes_equal_torch(config: ModelConfig) -> None:
    text = random_text(200)
    native, exact = (
        Stepper(model).open(1) for model in (freeze(tiny_model(config)), tiny_model(config, dtype=torch.float64))
    )
    assert_close_in_norm(native.step({1: text})[1], exact.step({1: text})[1], tolerance=1e-3)
    ours, theirs = native.state(1), exact.state(1)
    assert torch.equal(ours["layers.0.near_positions"], theirs["layers.0.near_positions"])
    assert torch.equal(ours["layers.0.near_scores"].double(), theirs["layers.0.near_scores"])
