"""States in int8: keys and values of the window as codes with a scale for each token and head."""

import pytest
import torch

from dijiang_model.config import ModelConfig
from dijiang_model.ops.torch.rounding import round_rows, widened_rows
from dijiang_model.reference.rounding import round_row_naive
from dijiang_model.serving.network import FrozenModel, freeze
from tests.dijiang_model.ops.test_bf16_states import CONFIGS, needs_kernels
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, random_text
from tests.tiny_models import tiny_model

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
