"""States in int8: keys and values of the window as codes with a scale for each token and head."""

import pytest
import torch

from dijiang_model.config import ModelConfig
from dijiang_model.native.library import VARIANTS, load_library, load_variant
from dijiang_model.ops.torch.rounding import round_rows, widened_rows
from dijiang_model.reference.rounding import round_row_naive
from dijiang_model.serving.network import FrozenModel, NativeModel, freeze
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, logits_of, random_text
from tests.tiny_models import gpt_neox_config, llama_config, opt_config, tiny_model

needs_kernels = pytest.mark.skipif(load_library() is None, reason="the kernels were not built: no compiler at install")
CONFIGS = {"llama": llama_config(), "gpt_neox": gpt_neox_config(), "opt": opt_config()}
# A code is off by 1/254 of the row's largest number at most; rows are read by every later token of the window.
TOLERANCE = 3e-2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


def int8_model(config: ModelConfig | None = None, *, native: bool = True) -> FrozenModel:
    return freeze(tiny_model(config).keep_states_in(torch.int8), native=native)


def test_rounding_agrees_with_the_naive_twin() -> None:
    rows = torch.randn(6, 16) * torch.logspace(-20, 20, 6)[:, None]
    rows[1, 3], rows[2, 0], rows[3] = torch.nan, torch.inf, 0.0
    codes, scales = round_rows(rows)
    for row, found, scale in zip(rows, codes, scales, strict=True):
        expected, expected_scale = round_row_naive(row.tolist())
        assert found.tolist() == expected
        assert torch.equal(scale.nan_to_num(), torch.tensor(expected_scale).nan_to_num())
        assert bool(scale.isnan()) == (not bool(row.isfinite().all()))


def test_halves_of_a_rows_largest_number_which_lie_at_ties_are_rounded_as_the_naive_twin_rounds_them() -> None:
    largest = torch.randn(200).bfloat16().float().abs()
    rows = torch.stack([largest, largest / 2, -largest / 2, largest / 254], 1)
    codes, scales = round_rows(rows)
    for row, found, scale in zip(rows, codes, scales, strict=True):
        assert (found.tolist(), float(scale)) == round_row_naive(row.tolist())


def test_a_row_is_off_by_half_a_code_at_most_and_rounding_it_again_changes_nothing() -> None:
    rows = torch.randn(50, 64)
    once = widened_rows(*round_rows(rows))
    half_a_code = rows.abs().amax(-1, keepdim=True) / 254
    assert ((once - rows).abs() <= half_a_code * (1 + 1e-5)).all()
    assert torch.equal(round_rows(once)[0], round_rows(rows)[0])


def test_a_window_takes_about_a_quarter_and_the_sums_a_half(config: ModelConfig) -> None:
    wide = {tensor.name: tensor for tensor in tiny_model(config).state_spec.tensors}
    int8 = {tensor.name: tensor for tensor in int8_model(config).state_spec.tensors}
    for name, tensor in wide.items():
        kind = name.rsplit(".", 1)[-1]
        assert int8[name].num_bytes * {"linear_state": 2, "normaliser": 1}.get(kind, 4) == tensor.num_bytes
    added = {name.rsplit(".", 1)[-1] for name in int8.keys() - wide.keys()}
    assert added <= {"near_key_scales", "near_value_scales"}


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_kernels)], ids=["torch", "native"])
def test_answers_stay_near_those_of_wide_states(config: ModelConfig, native: bool) -> None:
    text = random_text(60)
    int8 = Stepper(int8_model(config, native=native)).open(1)
    decoded = torch.cat([int8.step(decode={1: token})[1] for token in text])
    assert_close_in_norm(decoded, logits_of(tiny_model(config), text), tolerance=TOLERANCE)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_and_torch_leave_the_same_state(variant: str, config: ModelConfig) -> None:
    library = load_variant(variant)
    if library is None:
        pytest.skip(f"no {variant} kernels for this processor")
    model, text = tiny_model(config).keep_states_in(torch.int8), random_text(40)
    native = NativeModel(model, library=library)
    ours, theirs = Stepper(native).open(1), Stepper(int8_model(config, native=False)).open(1)
    for token in text:
        actual, expected = (stepper.step(decode={1: token})[1] for stepper in (ours, theirs))
    assert_close_in_norm(actual, expected, tolerance=TOLERANCE)
    for name, tensor in ours.state(1).items():
        # Where fp32 sums differ in their last bit, a number may go to its other neighbour.
        assert_close_in_norm(tensor.float(), theirs.state(1)[name].float(), tolerance=2e-2, what=name)


@needs_kernels
def test_a_prompt_leaves_the_same_bits_however_it_is_cut_and_whatever_runs_beside_it(config: ModelConfig) -> None:
    model, text = int8_model(config), random_text(50)
    whole, cut, single = (Stepper(model).open(1, 2) for _ in range(3))
    whole.step({1: text})
    cut.step({1: text[:13], 2: text[:7]})
    cut.step({2: text[7:9], 1: text[13:]})
    for token in text:
        single.step(decode={1: token, 2: 5})
    for name, tensor in whole.state(1).items():
        assert torch.equal(cut.state(1)[name], tensor), name
        assert torch.equal(single.state(1)[name], tensor), name


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_kernels)], ids=["torch", "native"])
def test_prompts_in_pieces_agree_with_tokens_one_by_one(config: ModelConfig, native: bool) -> None:
    model, text = int8_model(config, native=native), random_text(50)
    single, cut = Stepper(model).open(1), Stepper(model).open(1)
    decoded = torch.cat([single.step(decode={1: token})[1] for token in text])
    pieces = torch.cat([cut.step({1: piece})[1] for piece in (text[:21], text[21:])])
    # In torch the running sums are rounded after each piece, not after each token.
    assert_close_in_norm(pieces, decoded, tolerance=TOLERANCE)


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_kernels)], ids=["torch", "native"])
def test_a_key_that_is_not_finite_is_not_forgotten(native: bool) -> None:
    stepper = Stepper(int8_model(native=native)).open(1)
    stepper.step({1: random_text(3)})
    stepper.buffer.tensors["layers.0.near_key_scales"][1, 0, 0] = torch.nan
    logits = stepper.step(decode={1: 5})[1]
    assert logits.isnan().any()


def test_states_can_be_widened_again() -> None:
    model = tiny_model().keep_states_in(torch.int8).keep_states_in(torch.bfloat16)
    assert not any(tensor.dtype == torch.int8 for tensor in model.state_spec.tensors)
    assert model.keep_states_in(torch.float32).state_spec == tiny_model().state_spec
