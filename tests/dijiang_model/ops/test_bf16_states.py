"""States in bf16: stochastic rounding over thousands of tokens."""

import pytest
import torch
from torch import Tensor

from dijiang_model.config import ModelConfig
from dijiang_model.native.library import load_library
from dijiang_model.ops.torch.rounding import round_stochastically
from dijiang_model.reference.rounding import round_stochastically_naive
from dijiang_model.serving.network import FrozenModel, freeze
from tests.dijiang_model.stepping import Stepper, random_text
from tests.tiny_models import gpt_neox_config, llama_config, opt_config, tiny_model

needs_kernels = pytest.mark.skipif(load_library() is None, reason="the kernels were not built: no compiler at install")
CONFIGS = {"llama": llama_config(), "gpt_neox": gpt_neox_config(), "opt": opt_config()}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


def bf16_model(config: ModelConfig | None = None, *, native: bool = True) -> FrozenModel:
    return freeze(tiny_model(config).keep_states_in(torch.bfloat16), native=native)


def test_rounding_agrees_with_the_naive_twin() -> None:
    x = torch.randn(3, 2, 5, 7) * torch.logspace(-30, 30, 7)
    x[0, 0, 0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    actual = round_stochastically(x, torch.tensor([0, 70, 100_000]))
    for n, position in enumerate((0, 70, 100_000)):
        for group in range(2):
            expected = round_stochastically_naive(x[n, group], position)
            assert torch.equal(actual[n, group].isnan(), expected.isnan())
            assert torch.equal(actual[n, group].nan_to_num(), expected.nan_to_num())


def test_rounding_goes_to_a_neighbour_and_keeps_the_mean() -> None:
    x = torch.full((400, 1, 16, 16), 1.0 + 0.3 * 2**-7)
    rounded = round_stochastically(x, torch.arange(400)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    # 102,400 throws with a chance of 0.3: a standard deviation of 0.0014.
    share_up = (rounded > 1).float().mean()
    assert abs(float(share_up) - 0.3) < 0.007
    # And none of the places, nor of the positions, is loaded.
    for by in (0, (1, 2, 3)):
        shares = (rounded > 1).float().mean(dim=by)
        assert (shares - 0.3).abs().max() < 0.15


def test_numbers_that_bfloat16_has_are_kept() -> None:
    x = torch.randn(2, 3, 8, 8).bfloat16()
    assert torch.equal(round_stochastically(x.float(), torch.tensor([5, 6])), x)


def test_a_running_sum_does_not_drift_over_thousands_of_tokens() -> None:
    half_lives = torch.tensor([15.0, 900.0, 10_000.0])
    decay = (0.5 ** (1 / half_lives)).view(1, 3, 1, 1)
    exact = torch.zeros(1, 3, 16, 16)
    stochastic, nearest = exact.clone(), exact.clone()
    for position in range(2000):
        added = torch.rand(16, 1) / 8 * (torch.randn(1, 16) + 0.5)
        exact = exact * decay + added
        stochastic = round_stochastically(stochastic * decay + added, torch.tensor([position])).float()
        nearest = (nearest * decay + added).bfloat16().float()
    read = torch.softmax(torch.randn(16), 0)

    def errors(state: Tensor) -> Tensor:
        off, whole = (torch.einsum("k,ngkv->gv", read, part).square().sum(1) for part in (state - exact, exact))
        return torch.sqrt(off / whole)

    # A rounding is off by 2^-8 at most, at random; a half-life and a half of them are felt at a time.
    bound = 2**-8 * (1.5 * half_lives.clamp(max=2000)).sqrt() / 2
    assert (errors(stochastic) < bound).all()
    assert (errors(stochastic) < 0.04).all()
    assert (errors(nearest)[1:] > 2 * errors(stochastic)[1:]).all(), "to the nearest number would do as well"


def test_a_slot_takes_about_half_the_memory(config: ModelConfig) -> None:
    wide, narrow = tiny_model(config).state_spec, bf16_model(config).state_spec
    assert narrow.bytes_per_slot < 0.6 * wide.bytes_per_slot
    dtypes = {tensor.name.rsplit(".", 1)[-1]: tensor.dtype for tensor in narrow.tensors}
    assert dtypes.pop("normaliser", torch.float32) == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_a_nan_in_a_state_stays_a_nan(config: ModelConfig) -> None:
    stepper = Stepper(bf16_model(config)).open(1)
    stepper.buffer.tensors["layers.1.linear_state"][1, 0, 0] = torch.nan
    stepper.step({1: random_text(12)})
    assert stepper.state(1)["layers.1.linear_state"].isnan().any()


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="states are kept in float32, bfloat16 or int8"):
        tiny_model().keep_states_in(torch.float16)
    with pytest.raises(ValueError, match="models up to float32"):
        tiny_model(dtype=torch.float64).keep_states_in(torch.bfloat16)


def test_states_can_be_widened_again() -> None:
    model = tiny_model().keep_states_in(torch.bfloat16).keep_states_in(torch.float32)
    assert not model.has_reduced_states
    assert model.state_spec == tiny_model().state_spec
