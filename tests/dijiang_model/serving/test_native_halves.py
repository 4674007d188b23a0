"""bf16 weights in the compiled kernels: products, whole steps, states; rows are rounded to bf16, sums are fp32."""

import ctypes
import math
from ctypes import CDLL
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dijiang_model.config import ModelConfig
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.native.library import VARIANTS, load_library, load_variant
from dijiang_model.native.structures import Matrix
from dijiang_model.reference.halves import half_naive, half_product_naive
from dijiang_model.serving.decoder import NativeDecoder
from dijiang_model.serving.network import NativeModel, freeze
from dijiang_model.serving.weights import why_unsupported
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, assert_states_close, logits_of, random_text
from tests.tiny_models import HYBRID, PURE, gpt_neox_config, llama_config, opt_config, tiny_model

pytestmark = pytest.mark.skipif(load_library() is None, reason="the kernels were not built: no compiler at install")

CONFIGS: dict[str, ModelConfig] = {
    "llama": llama_config(),
    "far queries": llama_config(replace(HYBRID, features=replace(HYBRID.features, far_rank=5)), PURE),
    "gpt_neox": gpt_neox_config(),
    "opt": opt_config(HYBRID, PURE),
    "odd widths": replace(llama_config(), intermediate_size=75, vocab_size=261, attention_bias=True, mlp_bias=True),
}
# A row's numbers are rounded to 8 bits before each product, so are off by up to 2^-9, at random: half of that or less
# comes out of a product in norm, and a network of two layers has nine products on its longest way.
TOLERANCE = 9 * 2**-10
# GroupNorm over three channels each divides by a spread that may be small.
GROUP_NORM_TOLERANCE = 2 * TOLERANCE


def tolerance_of(config: ModelConfig) -> float:
    has_group_norm = any(layer.read_out == "group_norm" for layer in config.layers)
    return GROUP_NORM_TOLERANCE if has_group_norm else TOLERANCE


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture(params=list(VARIANTS))
def library(request: pytest.FixtureRequest) -> CDLL:
    library = load_variant(request.param)
    if library is None:
        pytest.skip(f"no {request.param} kernels for this CPU")
    return library


def product(library: CDLL, weight: Tensor, x: Tensor, *, threads: int = 1) -> Tensor:
    matrix = Matrix(halves=weight.data_ptr(), rows=weight.shape[0], columns=weight.shape[1])
    y = torch.empty((len(x), len(weight)), dtype=torch.float32)
    assert library.dijiang_linear(ctypes.addressof(matrix), x.data_ptr(), len(x), y.data_ptr(), threads) == 0
    return y


def half_model(config: ModelConfig) -> DiJiangForCausalLM:
    return tiny_model(config, dtype=torch.bfloat16)


def with_wide_weights(config: ModelConfig) -> DiJiangForCausalLM:
    """The fp64 model of the same numbers, on the torch path."""
    model, numbers = tiny_model(config, dtype=torch.float64), half_model(config).state_dict()
    model.load_state_dict({name: tensor.double() for name, tensor in numbers.items()})
    return model.prepare()


@given(
    num_rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    outputs=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_a_product_is_that_of_rows_rounded_to_bf16(num_rows: int, columns: int, outputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, columns, generator=generator).bfloat16()
    x = torch.randn(num_rows, columns, generator=generator)
    library = load_library()
    assert library is not None
    exact = functional.linear(x.bfloat16().double(), weight.double())
    assert torch.allclose(product(library, weight, x).double(), exact, rtol=0, atol=1e-6 * columns)


def test_every_kind_of_processor_agrees_with_the_naive_twin(library: CDLL) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(11, 77).bfloat16(), torch.randn(3, 77)
    assert_close_in_norm(product(library, weight, x).double(), half_product_naive(weight, x), tolerance=1e-6)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**120, min_value=-(2.0**120)))
def test_the_naive_twin_rounds_as_torch_does(x: float) -> None:
    assert half_naive(x) == float(torch.tensor(x, dtype=torch.float32).bfloat16())


def test_what_is_not_finite_stays_so_in_its_own_row(library: CDLL) -> None:
    weight, x = torch.ones(5, 70).bfloat16(), torch.ones(6, 70)
    x[1, 3], x[2, 69], x[4] = math.nan, math.inf, 0
    y = product(library, weight, x)
    assert y[1].isnan().all()
    assert y[2].isposinf().all()
    assert torch.equal(y[[0, 3, 4, 5]], torch.tensor([70.0, 70.0, 0.0, 70.0])[:, None].expand(4, 5))


@pytest.mark.parametrize("columns", [64, 130, 577])
def test_a_row_of_a_product_is_the_same_in_any_company_and_for_any_number_of_threads(
    library: CDLL, columns: int
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(151, columns).bfloat16(), torch.randn(21, columns)
    together = product(library, weight, x)
    assert torch.equal(product(library, weight, x, threads=3), together)
    for count in (1, 2, 3, 5, 16):
        assert torch.equal(product(library, weight, x[:count]), together[:count])


def test_steps_with_bf16_weights_equal_the_exact_model_in_logits_and_state(config: ModelConfig) -> None:
    native, exact = (Stepper(model).open(1, 2) for model in (freeze(half_model(config)), with_wide_weights(config)))
    assert native.model.decode_path == "native"
    prompt, text = random_text(50), random_text(30, seed=1)
    both = [stepper.step({1: prompt})[1] for stepper in (native, exact)]
    assert_close_in_norm(both[0], both[1], tolerance=tolerance_of(config))
    logits = [torch.stack([stepper.step(decode={1: t, 2: t})[2] for t in text]) for stepper in (native, exact)]
    assert_close_in_norm(logits[0], logits[1], tolerance=tolerance_of(config))
    for slot in (1, 2):
        assert_states_close(native.state(slot), exact.state(slot), tolerance=tolerance_of(config))


def test_every_kind_of_processor_steps_alike(library: CDLL, config: ModelConfig) -> None:
    text, model = random_text(20), NativeModel(half_model(config), library=library)
    assert_close_in_norm(
        logits_of(model, text), logits_of(with_wide_weights(config), text), tolerance=tolerance_of(config)
    )


def test_a_row_decodes_the_same_bit_for_bit_in_any_company(config: ModelConfig) -> None:
    model = freeze(half_model(config))
    alone, crowd = (Stepper(model, num_slots=19).open(*slots) for slots in ([1], range(1, 18)))
    for token in random_text(9):
        expected = alone.step(decode={1: token})[1]
        others = {slot: (token * slot) % 256 for slot in range(2, 18)}
        assert torch.equal(crowd.step(decode={**others, 1: token})[1], expected)
    for name, tensor in alone.state(1).items():
        assert torch.equal(crowd.state(1)[name], tensor), name


def test_weights_are_used_where_they_lie_and_states_stay_fp32() -> None:
    model = half_model(llama_config())
    assert {tensor.dtype for tensor in model.state_spec.tensors} == {torch.float32}
    narrow = half_model(llama_config()).keep_states_in(torch.bfloat16)
    assert freeze(narrow).decode_path == "native"
    assert {t.dtype for t in narrow.state_spec.tensors if "normaliser" not in t.name} == {torch.bfloat16}
    matrix = NativeDecoder(model)._weights.network.layers[1].mlp_down
    assert matrix.halves == model.get_parameter("model.layers.1.mlp.down_proj.weight").data_ptr()
    assert matrix.weight is None


def test_weights_of_two_kinds_are_left_to_torch() -> None:
    model = half_model(llama_config())
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.data = weight.data.float()
    assert "mlp.up_proj is torch.float32, and the output head torch.bfloat16" in str(why_unsupported(model))
