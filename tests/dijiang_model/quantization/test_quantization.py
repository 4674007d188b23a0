"""Quantized weights: rounding, products, whole networks, on the kernels and without them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from dijiang_model.checkpoints.quantized import quantize_, weights_to_quantize
from dijiang_model.config import ModelConfig
from dijiang_model.errors import QuantizationError
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.native.library import VARIANTS, load_library, load_variant
from dijiang_model.quantization import weight as weight_module
from dijiang_model.quantization.config import INT8, Quantization
from dijiang_model.quantization.modules import QuantizedEmbedding, QuantizedLinear, quantized_weights
from dijiang_model.quantization.rounding import fit_groups
from dijiang_model.quantization.tensors import InMemory, minimums_pay
from dijiang_model.quantization.weight import Int4Weight, Int8Weight, QuantizedWeight
from dijiang_model.reference.quantization import product_naive, weight_naive
from dijiang_model.serving.network import NativeModel, freeze
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, logits_of, random_text
from tests.tiny_models import (
    gemma3_config,
    gpt_neox_config,
    llama_config,
    olmo2_config,
    opt_config,
    qwen3_config,
    tiny_model,
)

needs_kernels = pytest.mark.skipif(load_library() is None, reason="the kernels were not built: no compiler at install")

CONFIGS: dict[str, ModelConfig] = {
    "llama": llama_config(),
    "gpt_neox": gpt_neox_config(),
    "opt": opt_config(),
    "qwen3": qwen3_config(),
    "gemma3": gemma3_config(),
    "olmo2": olmo2_config(),
    "odd widths": replace(llama_config(), intermediate_size=75, vocab_size=261, attention_bias=True, mlp_bias=True),
}
FORMS = {
    "int8": INT8,
    "int4": Quantization("int4", group_size=32),
    "int4, groups of 64 with minimums": Quantization("int4", group_size=64, has_minimums=True),
}
# Activations of 16 bits: each is off by up to half a unit in 32,767 of its row's largest, in every product of the way.
TOLERANCE = 3e-4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture(params=list(FORMS))
def form(request: pytest.FixtureRequest) -> Quantization:
    return FORMS[request.param]


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Products run in the kernels of one kind of processor."""
    library = load_variant(request.param)
    if library is None:
        pytest.skip(f"no {request.param} kernels for this CPU")
    monkeypatch.setattr(weight_module, "load_library", lambda: library)
    return str(request.param)


def rounded(weight: Tensor, form: Quantization) -> QuantizedWeight:
    return Int8Weight.of(weight) if form.weights == "int8" else Int4Weight.of(weight, form)


def with_rounded_weights(model: DiJiangForCausalLM, form: Quantization) -> DiJiangForCausalLM:
    """The fp32 model whose weights are the codes' values, on the torch path."""
    for name, wanted in weights_to_quantize(model, form).items():
        weight = model.get_parameter(name)
        weight.data = rounded(weight.detach(), wanted).dequantized()
    return model.prepare()


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 140),
    form=st.sampled_from(list(FORMS.values())),
    seed=st.integers(0, 2**31),
)
def test_codes_are_unpacked_as_the_naive_twin_reads_them(
    rows: int, columns: int, form: Quantization, seed: int
) -> None:
    weight = rounded(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), form)
    assert torch.equal(weight.dequantized(torch.float64), weight_naive(weight))


def test_int8_codes_are_within_half_a_step_of_the_weights() -> None:
    weight = torch.randn(9, 70)
    quantized = Int8Weight.of(weight)
    assert ((quantized.dequantized() - weight).abs() <= 0.5001 * quantized.scales[:, None]).all()
    assert quantized.codes.abs().max() == 127
    assert quantized.num_bytes == 9 * 70 + 9 * 4


def test_int4_codes_with_minimums_are_within_half_a_step_of_the_weights() -> None:
    weight = torch.randn(9, 70)
    quantized = Int4Weight.of(weight, Quantization("int4", group_size=32, has_minimums=True))
    step = quantized.scales.float().repeat_interleave(32, dim=1)[:, :70]
    # Scale and minimum are fp16, with 11 bits: 15 steps of a scale that is off by 2^-12, and a minimum as large.
    assert ((quantized.dequantized() - weight).abs() <= 0.52 * step).all()
    assert quantized.num_bytes == 5 * 70 + 9 * 3 * 4


def test_int4_codes_without_minimums_keep_zero_and_the_largest_weight() -> None:
    weight = torch.randn(8, 64)
    weight[:, ::7] = 0
    weight[3] = 0
    values = Int4Weight.of(weight, Quantization("int4", group_size=32)).dequantized()
    assert (values[weight == 0] == 0).all()
    largest = weight.unflatten(1, (2, 32)).abs().amax(-1)
    assert torch.allclose(values.unflatten(1, (2, 32)).abs().amax(-1), largest, rtol=2**-11)


def test_weights_that_were_rounded_so_before_are_kept() -> None:
    form = Quantization("int4", group_size=32, has_minimums=True)
    before = Int4Weight.of(torch.randn(6, 96), form).dequantized()
    assert torch.allclose(
        Int4Weight.of(before, form).dequantized(), before, rtol=0, atol=float(before.abs().max()) / 2**9
    )
    assert minimums_pay(InMemory({"w": before}), ["w"], group_size=32)
    assert not minimums_pay(InMemory({"w": torch.randn(6, 96)}), ["w"], group_size=32)


def test_weights_beyond_the_scales_range_are_refused() -> None:
    with pytest.raises(QuantizationError, match=r"weights up to 1e\+06 are too large for scales in fp16"):
        fit_groups(torch.tensor([[1e6, 1.0]]), group_size=32, has_minimums=False)


@needs_kernels
@given(
    num_rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    outputs=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    has_bias=st.booleans(),
    form=st.sampled_from(list(FORMS.values())),
)
def test_a_product_is_that_of_the_rounded_weights(
    num_rows: int, columns: int, outputs: int, seed: int, has_bias: bool, form: Quantization
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = rounded(torch.randn(outputs, columns, generator=generator), form)
    x = torch.randn(num_rows, columns, generator=generator)
    bias = torch.randn(outputs, generator=generator) if has_bias else None
    # Each term is off by at most half a step of the row's scale.
    bound = x.abs().amax(1, keepdim=True) / 32767 * 0.51 * weight.dequantized().abs().sum(1) + 1e-5
    assert ((weight.product(x, bias) - functional.linear(x, weight.dequantized(), bias)).abs() <= bound).all()


def test_every_kind_of_kernel_agrees_with_the_naive_twin(variant: str, form: Quantization) -> None:
    weight, x = rounded(torch.randn(11, 150), form), torch.randn(3, 150)
    # int8 sums are exact; int4 ones are exact in blocks of columns and rounded to fp32 between them, a dozen times.
    assert_close_in_norm(weight.product(x).double(), product_naive(weight, x), tolerance=1e-6)


def test_sums_of_rows_too_long_for_32_bits_are_right(variant: str) -> None:
    """The largest codes and activations of all, of one sign: 20,000 products of 127 and 32,767."""
    weight, x = Int8Weight.of(torch.ones(5, 20_000)), torch.ones(6, 20_000)
    assert torch.allclose(weight.product(x), torch.full((6, 5), 20_000.0), rtol=1e-6)


def test_a_row_of_a_product_is_the_same_in_any_company(variant: str, form: Quantization) -> None:
    weight, x = rounded(torch.randn(37, 130), form), torch.randn(11, 130)
    together = weight.product(x)
    for n in range(len(x)):
        assert torch.equal(weight.product(x[n : n + 1])[0], together[n])


@needs_kernels
def test_any_number_of_threads_computes_the_same_product(form: Quantization) -> None:
    weight, x, before = rounded(torch.randn(103, 130), form), torch.randn(2, 130), torch.get_num_threads()
    alone = weight.product(x)
    try:
        torch.set_num_threads(3)
        assert torch.equal(weight.product(x), alone)
    finally:
        torch.set_num_threads(before)


def test_rows_of_zeros_and_rows_that_are_not_finite_stay_what_they_are(variant: str, form: Quantization) -> None:
    weight = rounded(torch.cat([torch.zeros(1, 64), torch.randn(4, 64)]), form)
    x = torch.randn(4, 64)
    x[0], x[1, 5], x[2, 7] = 0, torch.nan, torch.inf
    y = weight.product(x)
    assert torch.equal(y[0], torch.zeros(5))
    assert y[1:3].isnan().all()
    assert y[3].isfinite().all()
    assert y[3, 0] == 0


def test_quantised_networks_compute_with_the_rounded_weights(config: ModelConfig, form: Quantization) -> None:
    text = random_text(30)
    actual = logits_of(freeze(quantize_(tiny_model(config), form)), text)
    expected = logits_of(with_rounded_weights(tiny_model(config), form), text)
    assert_close_in_norm(actual, expected, tolerance=TOLERANCE)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_equals_prefill_with_quantized_weights(variant: str, config: ModelConfig, form: Quantization) -> None:
    library = load_variant(variant)
    if library is None:
        pytest.skip(f"no {variant} kernels for this CPU")
    text, model = random_text(20), quantize_(tiny_model(config), form)
    expected = logits_of(model, text)
    stepper = Stepper(NativeModel(model, library=library)).open(1, 2, 3)
    decoded = torch.cat([stepper.step(decode={1: token, 2: 7, 3: token})[1] for token in text])
    assert_close_in_norm(decoded, expected, tolerance=TOLERANCE)


@needs_kernels
def test_a_row_decodes_the_same_bit_for_bit_in_any_company(config: ModelConfig, form: Quantization) -> None:
    model = freeze(quantize_(tiny_model(config), form))
    alone, crowd = (Stepper(model, num_slots=9).open(*slots) for slots in ([1], range(1, 8)))
    for token in random_text(9):
        expected = alone.step(decode={1: token})[1]
        others = {slot: (token * slot) % 256 for slot in range(2, 8)}
        assert torch.equal(crowd.step(decode={**others, 1: token})[1], expected)


def test_without_kernels_the_answer_is_the_same(monkeypatch: pytest.MonkeyPatch, form: Quantization) -> None:
    text, model = random_text(20), quantize_(tiny_model(), form)
    expected = logits_of(freeze(model), text)
    monkeypatch.setattr(weight_module, "load_library", lambda: None)
    assert_close_in_norm(logits_of(freeze(model), text), expected, tolerance=TOLERANCE)


def test_bfloat16_activations_meet_the_same_codes(form: Quantization) -> None:
    weight, x = rounded(torch.randn(9, 70), form), torch.randn(4, 70)
    actual = weight.product(x.bfloat16())
    assert actual.dtype == torch.bfloat16
    # Inputs, weights and outputs have 8 bits each; a weight with a minimum is rounded three times.
    assert_close_in_norm(actual.float(), functional.linear(x, weight.dequantized()), tolerance=1e-2)


def test_projections_embedding_and_head_are_quantised_and_nothing_else(config: ModelConfig, form: Quantization) -> None:
    model = quantize_(tiny_model(config), form)
    kinds = [type(module) for module in model.modules()]
    assert nn.Linear not in kinds
    assert kinds.count(QuantizedEmbedding) == 1
    assert kinds.count(QuantizedLinear) >= 4 * config.num_layers
    assert isinstance(model.head, Int8Weight)
    assert model.num_parameters == tiny_model(config).num_parameters
    wanted = weights_to_quantize(tiny_model(config), form)
    assert {f"{path}" for path, _ in quantized_weights(model)} == set(wanted)
