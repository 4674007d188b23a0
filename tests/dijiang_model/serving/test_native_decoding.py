"""Steps prepared once for sequences that decode: the bits of single steps, and tokens of the naive choice."""

import ctypes
import gc
import weakref
from collections.abc import Callable
from ctypes import CDLL
from functools import partial

import pytest
import torch

from dijiang_model.batch import decode
from dijiang_model.checkpoints.quantized import quantize_
from dijiang_model.config import ModelConfig
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.native.choose import NOT_FINITE
from dijiang_model.native.library import VARIANTS, load_library, load_variant
from dijiang_model.native.structures import DrawRules
from dijiang_model.quantization.config import INT8, Quantization
from dijiang_model.reference.choosing import greedy_token
from dijiang_model.reference.drawing import sampled_token
from dijiang_model.serving.decoding import Decoding
from dijiang_model.serving.network import FrozenModel, NativeModel
from dijiang_model.state import StateBuffer
from tests.dijiang_model.serving.test_native import CONFIGS
from tests.dijiang_model.stepping import POISON
from tests.tiny_models import gemma3_config, gpt_neox_config, opt_config, tiny_model, tiny_network

pytestmark = pytest.mark.skipif(load_library() is None, reason="the kernels were not built: no compiler at install")


def looks_tokens_up(config: ModelConfig) -> bool:
    """Whether the first block reads a row of the embedding as it is."""
    return config.family != "opt" and config.embedding_scale == 1


MODELS: dict[str, Callable[[], DiJiangForCausalLM]] = {
    **{name: partial(tiny_model, config) for name, config in CONFIGS.items() if looks_tokens_up(config)},
    "bf16": lambda: tiny_model(dtype=torch.bfloat16),
    "int8": lambda: quantize_(tiny_model(), INT8),
    "int4": lambda: quantize_(tiny_model(), Quantization("int4", group_size=32)),
    "int8, head of its own": lambda: quantize_(tiny_model(gpt_neox_config()), INT8),
    "int8 states": lambda: tiny_model().keep_states_in(torch.int8),
}
SLOTS, STARTS = [3, 1, 4], [0, 7, 40]
NUM_STEPS = 12


@pytest.fixture(params=VARIANTS)
def library(request: pytest.FixtureRequest) -> CDLL:
    found = load_variant(request.param)
    if found is None:
        pytest.skip("this processor does not run it")
    return found


def cleared(model: FrozenModel) -> StateBuffer:
    """Slots 0 to 5; those that nobody uses hold NaN."""
    state = StateBuffer(model.state_spec, 6)
    state.storage.fill_(POISON)
    state.storage[SLOTS] = 0
    return state


def decoding(model: FrozenModel, last_token_ids: torch.Tensor, state: StateBuffer) -> Decoding:
    made = model.decoding(slots=SLOTS, positions=STARTS, last_token_ids=last_token_ids, state=state)
    assert made is not None
    return made


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_tokens_and_states_are_those_of_single_steps_and_naive_choices(library: CDLL, kind: str) -> None:
    model = NativeModel(MODELS[kind](), library=library)
    state, twin = cleared(model), cleared(model)
    last = torch.tensor([9, 8, 7, 6, 5, 4])
    rows, expected = decoding(model, last, state), last[SLOTS]
    for number in range(NUM_STEPS):
        positions = torch.tensor(STARTS) + number
        logits = decode(model, expected, slots=torch.tensor(SLOTS), positions=positions, state=twin)
        expected = torch.tensor([greedy_token(row) for row in logits])
        assert rows.choose() == expected.tolist()
        assert torch.equal(rows.logits, logits)
        assert torch.equal(state.storage, twin.storage)
    assert last[SLOTS].tolist() == expected.tolist()
    assert last[[0, 2, 5]].tolist() == [9, 7, 4], "tokens of other slots were written"


@torch.no_grad()
def test_a_step_without_a_choice_leaves_the_last_tokens_to_the_caller() -> None:
    model = tiny_network()
    state, twin = cleared(model), cleared(model)
    last = torch.tensor([9, 8, 7, 6, 5, 4])
    rows = decoding(model, last, state)
    for number in range(NUM_STEPS):
        fed = torch.tensor([10 + number, 20 + number, 30 + number])
        last[SLOTS] = fed
        positions = torch.tensor(STARTS) + number
        logits = decode(model, fed, slots=torch.tensor(SLOTS), positions=positions, state=twin)
        assert torch.equal(rows.step(), logits)
        assert last[SLOTS].tolist() == fed.tolist()


@pytest.mark.parametrize("rules", [None, (DrawRules * 3)(*[DrawRules(0.5, 1.0, 0.0, 2**40, 2.0)] * 3)])
@torch.no_grad()
def test_a_row_that_is_not_finite_has_no_token_and_the_next_step_a_valid_one_to_feed(
    rules: "ctypes.Array[DrawRules] | None",
) -> None:
    model = tiny_network()
    state = cleared(model)
    state.storage[SLOTS[1]] = POISON
    last = torch.tensor([9, 8, 7, 6, 5, 4])
    rows = decoding(model, last, state)
    chosen = rows.choose(rules)
    assert [token == NOT_FINITE for token in chosen] == [False, True, False]
    assert last[SLOTS].tolist() == [chosen[0], 0, chosen[2]]
    assert rows.choose(rules)[1] == NOT_FINITE


@torch.no_grad()
def test_rows_are_drawn_by_their_rules_beside_greedy_ones_and_feed_what_was_drawn() -> None:
    model = tiny_network()
    state, twin = cleared(model), cleared(model)
    last = torch.tensor([9, 8, 7, 6, 5, 4])
    rows, expected = decoding(model, last, state), last[SLOTS]
    for number in range(NUM_STEPS):
        positions = torch.tensor(STARTS) + number
        logits = decode(model, expected, slots=torch.tensor(SLOTS), positions=positions, state=twin)
        uniform = (number + 0.5) / NUM_STEPS
        drawn = sampled_token(logits[1], uniform=uniform, temperature=3.0, top_p=0.9)
        expected = torch.tensor([greedy_token(logits[0]), drawn, greedy_token(logits[2])])
        greedy, hot = DrawRules(top_k=2**40, top_p=2.0), DrawRules(uniform, 3.0, 0.0, 2**40, 0.9)
        assert rows.choose((DrawRules * 3)(greedy, hot, greedy)) == expected.tolist()
        assert last[SLOTS].tolist() == expected.tolist()


@pytest.mark.parametrize("slots", [[-1], [6], [1, 6]])
def test_a_slot_that_does_not_exist_is_refused(slots: list[int]) -> None:
    model = tiny_network()
    with pytest.raises(IndexError, match="not all in 0 to 5"):
        model.decoding(
            slots=slots, positions=[0] * len(slots), last_token_ids=torch.zeros(6).long(), state=cleared(model)
        )


@pytest.mark.parametrize(("config", "native"), [(None, False), (opt_config(), True), (gemma3_config(), True)])
def test_torch_and_tokens_that_are_more_than_looked_up_have_no_prepared_steps(
    config: ModelConfig | None, native: bool
) -> None:
    model = tiny_network(config, native=native)
    assert model.can_defer == native
    assert model.decoding(slots=[1], positions=[0], last_token_ids=torch.zeros(6).long(), state=cleared(model)) is None


def test_steps_outlive_the_model_that_prepared_them() -> None:
    """Whoever holds them holds the weights: the kernels would read what is no longer there."""
    model = NativeModel(MODELS["int8"]())
    weights = weakref.ref(next(part for part in model._decoder._weights.kept if isinstance(part, torch.Tensor)))
    rows = decoding(model, torch.zeros(6, dtype=torch.int64), cleared(model))
    del model
    gc.collect()
    assert weights() is not None
    del rows
    gc.collect()
    assert weights() is None
