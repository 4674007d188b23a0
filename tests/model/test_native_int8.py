"""int8 weights: the products, the whole network, the path without kernels."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from dijiang_model.checkpoints import load_model
from dijiang_model.config import ModelConfig
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.native import int8
from dijiang_model.native.decoder import NativeDecoder
from dijiang_model.native.int8 import Int8Linear, Int8Weight, quantize_
from dijiang_model.native.library import VARIANTS, load_library, load_variant
from tests.model.stepping import Stepper, assert_close_in_norm, logits_of, random_text
from tests.tiny_models import gpt_neox_config, llama_config, opt_config, tiny_model, write_tiny_model

needs_kernels = pytest.mark.skipif(load_library() is None, reason="the kernels were not built: no compiler at install")

CONFIGS: dict[str, ModelConfig] = {
    "llama": llama_config(),
    "gpt_neox": gpt_neox_config(),
    "opt": opt_config(),
    "odd widths": replace(llama_config(), intermediate_size=75, vocab_size=261, attention_bias=True, mlp_bias=True),
}
# Activations of 16 bits: each is off by up to half a unit in 32,767 of its row's largest, in every product of the way.
TOLERANCE = 3e-4


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


def with_rounded_weights(model: DiJiangForCausalLM) -> DiJiangForCausalLM:
    """The fp32 model whose weights are the codes' values, on the torch path."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Int8Weight(module.weight).dequantized())
    head = Int8Weight(model.head_weight).dequantized()
    # Look-ups stay exact where the head is tied to the embedding.
    model.logits = lambda hidden: functional.linear(hidden, head)  # type: ignore[method-assign]
    return model.prepare(native=False)


@needs_kernels
@given(
    num_rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    outputs=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    has_bias=st.booleans(),
)
def test_a_product_is_that_of_the_rounded_weights(
    num_rows: int, columns: int, outputs: int, seed: int, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = Int8Weight(torch.randn(outputs, columns, generator=generator))
    x = torch.randn(num_rows, columns, generator=generator)
    bias = torch.randn(outputs, generator=generator) if has_bias else None
    exact = functional.linear(x, weight.dequantized(), bias)
    # Each term is off by at most half a step of the row's scale.
    bound = x.abs().amax(1, keepdim=True) / 32767 * 0.51 * weight.dequantized().abs().sum(1) + 1e-5
    assert ((weight.product(x, bias) - exact).abs() <= bound).all()


@needs_kernels
def test_a_row_of_a_product_is_the_same_in_any_company() -> None:
    weight, x = Int8Weight(torch.randn(37, 130)), torch.randn(11, 130)
    together = weight.product(x)
    for n in range(len(x)):
        assert torch.equal(weight.product(x[n : n + 1])[0], together[n])


@needs_kernels
def test_rows_of_zeros_and_rows_that_are_not_finite_stay_what_they_are() -> None:
    weight = Int8Weight(torch.cat([torch.zeros(1, 64), torch.randn(4, 64)]))
    x = torch.randn(4, 64)
    x[0], x[1, 5], x[2, 7] = 0, torch.nan, torch.inf
    y = weight.product(x)
    assert torch.equal(y[0], torch.zeros(5))
    assert y[1:3].isnan().all()
    assert y[3].isfinite().all()
    assert y[3, 0] == 0


def test_codes_are_within_half_a_step_of_the_weights() -> None:
    weight = torch.randn(9, 70)
    quantized = Int8Weight(weight)
    step = quantized.scales[:, None]
    assert ((quantized.dequantized() - weight).abs() <= 0.5001 * step).all()
    assert quantized.codes.abs().max() == 127
    assert quantized.num_bytes == 9 * 128 + 9 * 8


def test_quantised_networks_compute_with_the_rounded_weights(config: ModelConfig) -> None:
    text = random_text(30)
    actual = logits_of(quantize_(tiny_model(config)), text)
    expected = logits_of(with_rounded_weights(tiny_model(config)), text)
    assert_close_in_norm(actual, expected, tolerance=TOLERANCE)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_equals_prefill_with_int8_weights(variant: str, config: ModelConfig) -> None:
    library = load_variant(variant)
    if library is None:
        pytest.skip(f"no {variant} kernels for this processor")
    text, model = random_text(30), quantize_(tiny_model(config))
    expected = logits_of(model, text)
    model._decoder = NativeDecoder(model, library=library)
    stepper = Stepper(model).open(1, 2, 3)
    decoded = torch.cat([stepper.step(decode={1: token, 2: 7, 3: token})[1] for token in text])
    assert_close_in_norm(decoded, expected, tolerance=TOLERANCE)


@needs_kernels
def test_a_row_decodes_the_same_bit_for_bit_in_any_company_with_int8_weights(config: ModelConfig) -> None:
    model = quantize_(tiny_model(config))
    alone, crowd = (Stepper(model, num_slots=9).open(*slots) for slots in ([1], range(1, 8)))
    for token in random_text(9):
        expected = alone.step(decode={1: token})[1]
        others = {slot: (token * slot) % 256 for slot in range(2, 8)}
        assert torch.equal(crowd.step(decode={**others, 1: token})[1], expected)


def test_without_kernels_the_answer_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    text, model = random_text(20), quantize_(tiny_model())
    expected = logits_of(model, text)
    monkeypatch.setattr(int8, "load_library", lambda: None)
    assert_close_in_norm(logits_of(model.prepare(native=False), text), expected, tolerance=TOLERANCE)


def test_every_projection_is_quantised_and_nothing_else(config: ModelConfig) -> None:
    model = quantize_(tiny_model(config))
    kinds = [type(module) for block in model.blocks for module in block.modules()]
    assert nn.Linear not in kinds
    assert kinds.count(Int8Linear) >= 4 * config.num_layers
    assert model.int8_head is not None
    assert torch.equal(model.head_weight, tiny_model(config).head_weight)


def test_load_model_quantises_on_request(tmp_path: Path) -> None:
    folder, text = write_tiny_model(tmp_path / "model"), random_text(10)
    actual = logits_of(load_model(folder, weights="int8"), text)
    assert torch.equal(actual, logits_of(quantize_(tiny_model()), text))


def test_int8_weights_need_fp32_on_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"float32 model on a CPU, not torch\.float64"):
        quantize_(tiny_model(dtype=torch.float64))
