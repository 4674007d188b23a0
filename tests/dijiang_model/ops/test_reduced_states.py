"""What states in bf16 and in int8 have in common: near those of fp32, the same bits however a prompt was cut."""

import pytest
import torch

from dijiang_model.config import ModelConfig
from dijiang_model.native.library import VARIANTS, load_variant
from dijiang_model.serving.network import FrozenModel, NativeModel, freeze
from tests.dijiang_model.ops.test_bf16_states import CONFIGS, needs_kernels
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, logits_of, random_text
from tests.tiny_models import tiny_model

# bf16 has 8 bits, and a code of int8 is off by 1/254 of the row's largest number at most; what is rounded is read again
# for many tokens.
TOLERANCE = 3e-2
STATE_TOLERANCE = {torch.bfloat16: 1e-2, torch.int8: 2e-2}

pytestmark = pytest.mark.parametrize("dtype", STATE_TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


def reduced_model(config: ModelConfig, dtype: torch.dtype, *, native: bool = True) -> FrozenModel:
    return freeze(tiny_model(config).keep_states_in(dtype), native=native)


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_kernels)], ids=["torch", "native"])
def test_answers_stay_near_those_of_wide_states(config: ModelConfig, dtype: torch.dtype, native: bool) -> None:
    text = random_text(60)
    reduced = Stepper(reduced_model(config, dtype, native=native)).open(1)
    decoded = torch.cat([reduced.step(decode={1: token})[1] for token in text])
    assert_close_in_norm(decoded, logits_of(tiny_model(config), text), tolerance=TOLERANCE)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_and_torch_leave_the_same_state(variant: str, config: ModelConfig, dtype: torch.dtype) -> None:
    library = load_variant(variant)
    if library is None:
        pytest.skip(f"no {variant} kernels for this CPU")
    model, text = tiny_model(config).keep_states_in(dtype), random_text(40)
    native = NativeModel(model, library=library)
    ours, theirs = Stepper(native).open(1), Stepper(reduced_model(config, dtype, native=False)).open(1)
    for token in text:
        actual, expected = (stepper.step(decode={1: token})[1] for stepper in (ours, theirs))
    assert_close_in_norm(actual, expected, tolerance=TOLERANCE)
    for name, tensor in ours.state(1).items():
        # Where fp32 sums differ in their last bit, a number may go to its other neighbour.
        wanted = theirs.state(1)[name].float()
        assert_close_in_norm(tensor.float(), wanted, tolerance=STATE_TOLERANCE[dtype], what=name)


@needs_kernels
def test_a_prompt_leaves_the_same_bits_however_it_is_cut_and_whatever_runs_beside_it(
    config: ModelConfig, dtype: torch.dtype
) -> None:
    model, text = reduced_model(config, dtype), random_text(50)
    whole, cut, single = (Stepper(model).open(1, 2) for _ in range(3))
    whole.step({1: text})
    cut.step({1: text[:13], 2: text[:7]})
    cut.step({2: text[7:9], 1: text[13:]})
    for token in text:
        single.step(decode={1: token, 2: 5})
    for name, tensor in whole.state(1).items():
        assert torch.equal(cut.state(1)[name], tensor), name
        assert torch.equal(single.state(1)[name], tensor), name
