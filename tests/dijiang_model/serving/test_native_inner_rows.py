"""Inner rows of an MLP: where there is a matrix unit, those of sixteen tokens lie side by side, to the same bits."""

from dataclasses import replace

import pytest
import torch

from dijiang_model.checkpoints.quantized import quantize_
from dijiang_model.config import ModelConfig
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.native.library import load_library
from dijiang_model.quantization.config import Quantization
from dijiang_model.serving.decoder import NativeDecoder
from dijiang_model.serving.network import freeze
from dijiang_model.state import StateBuffer
from tests.dijiang_model.stepping import Stepper, random_text
from tests.tiny_models import llama_config, tiny_model

pytestmark = pytest.mark.skipif(load_library() is None, reason="the kernels were not built: no compiler at install")

CONFIGS: dict[str, ModelConfig] = {
    "one block of codes": replace(llama_config(), intermediate_size=64),
    "several, with biases": replace(llama_config(), intermediate_size=192, mlp_bias=True),
    "another activation": replace(llama_config(), intermediate_size=128, activation="gelu"),
    "widths that fill no block": replace(llama_config(), intermediate_size=80),
}


def quantized(config: ModelConfig, weights: str) -> DiJiangForCausalLM:
    if weights == "bfloat16":
        return tiny_model(config, dtype=torch.bfloat16)
    return quantize_(tiny_model(config), Quantization("int8"))


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_tokens_side_by_side_become_what_each_becomes_alone(config: ModelConfig, weights: str) -> None:
    model, text = freeze(quantized(config, weights)), random_text(75)
    assert model.decode_path == "native"
    single = Stepper(model).open(1)
    alone = torch.cat([single.step(decode={1: token})[1] for token in text])
    for size in (2, 15, 16, 17, 33, 75):
        cut = Stepper(model).open(1)
        pieces = [cut.step({1: text[first : first + size]})[1] for first in range(0, len(text), size)]
        assert torch.equal(torch.cat(pieces), alone)


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_a_token_that_is_not_finite_leaves_those_beside_it_alone(weights: str) -> None:
    model = quantized(CONFIGS["one block of codes"], weights)
    decoder, length, num_texts = NativeDecoder(model), 7, 3
    rows = length * num_texts

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        state = StateBuffer(model.state_spec, num_texts + 1, torch.device("cpu"))
        state.storage.zero_()
        return decoder.step(
            hidden.clone(),
            positions=torch.arange(length).repeat(num_texts),
            slots=torch.arange(1, num_texts + 1),
            lengths=[length] * num_texts,
            wanted=torch.arange(rows),
            state=state,
        )

    hidden = torch.randn(rows, model.config.hidden_size)
    clean = logits(hidden)
    hidden[length, 3], hidden[length + 2, 0] = torch.nan, torch.inf
    spoilt = logits(hidden)
    assert spoilt[length : 2 * length].isnan().any(1).all()
    others = [n for n in range(rows) if not length <= n < 2 * length]
    assert torch.equal(spoilt[others], clean[others])
