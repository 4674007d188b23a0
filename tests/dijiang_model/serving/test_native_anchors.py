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
from tests.tiny_models import HYBRID, NO_LINEAR, anchored, llama_config, qwen3_config, tiny_model

pytestmark = pytest.mark.skipif(load_library() is None, reason="the kernels were not built: no compiler at install")
CONFIG = llama_config(anchored(2), anchored(2))
UNROTATED = replace(HYBRID, features=replace(HYBRID.features, rotated=False))
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


# Windows of 16 tokens and more: where there is a matrix unit, a prompt's tokens then ask their places 16 at a time.
WIDE = {
    "a window of more tokens than are read together": anchored(2, places=(61, 40), windows=(20, 33)),
    "values of 4 bits": anchored(2, places=(61, 40), windows=(16, 17), value_bits=4),
    "anchors that hardly stay": anchored(2, places=(22, 38), windows=(16, 16)),
    "no anchors at all": anchored(2, places=(22, 38), windows=(20, 36)),
    "more sinks than go together": anchored(2, places=(61, 70), windows=(18, 5), base=replace(HYBRID, sinks=19)),
    "features before rotation": anchored(2, places=(61, 40), windows=(18, 25), base=UNROTATED),
    "no linear part": anchored(2, places=(61, 40), windows=(18, 25), base=NO_LINEAR),
}


@pytest.mark.parametrize("head_size", [16, 64, 80])
@pytest.mark.parametrize("layer", list(WIDE))
def test_tokens_that_are_read_together_see_what_each_would_alone(layer: str, head_size: int) -> None:
    config = replace(llama_config(WIDE[layer], num_heads=6), head_size=head_size, rotary_dims=head_size)
    model, text = freeze(tiny_model(config)), random_text(170)
    assert model.decode_path == "native"
    whole, cut, single = (Stepper(model).open(1) for _ in range(3))
    logits = whole.step({1: text})[1]
    pieces, first = [], 0
    for size in (3, 41, 5, 16, 105):
        pieces.append(cut.step({1: text[first : first + size]})[1])
        first += size
    tokens = [single.step(decode={1: token})[1] for token in text]
    assert torch.equal(torch.cat(pieces), logits)
    assert torch.equal(torch.cat(tokens), logits)
    for name, tensor in whole.state(1).items():
        assert torch.equal(cut.state(1)[name], tensor), name
        assert torch.equal(single.state(1)[name], tensor), name


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
