"""Held slots: a step that leaves them as they are, then the same step's tokens taken over one count at a time."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dijiang_model.batch import PackedBatch, decode
from dijiang_model.native.library import VARIANTS, load_library, load_variant
from dijiang_model.serving.decoder import MAX_UNCOMMITTED_ROWS
from dijiang_model.serving.network import FrozenModel, NativeModel, freeze
from dijiang_model.state import StateBuffer
from tests.dijiang_model.serving.test_native import CONFIGS
from tests.dijiang_model.stepping import POISON, random_text
from tests.tiny_models import tiny_model, tiny_network

pytestmark = pytest.mark.skipif(load_library() is None, reason="the kernels were not built: no compiler at install")

NARROW = (
    "hybrid and pure with two bases",
    "position tables",
    "features before rotation",
    "anchors",
    "anchors, features before rotation",
)
KINDS = [
    *((name, torch.float32) for name in CONFIGS),
    *((name, dtype) for name in NARROW for dtype in (torch.bfloat16, torch.int8)),
]
_models: dict[tuple[str, torch.dtype], FrozenModel] = {}


def model_of(name: str, states: torch.dtype) -> FrozenModel:
    if (name, states) not in _models:
        _models[name, states] = freeze(tiny_model(CONFIGS[name]).keep_states_in(states))
    return _models[name, states]


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def step(
    model: FrozenModel,
    state: StateBuffer,
    rows: dict[int, list[int]],
    starts: dict[int, int],
    *,
    num_decode: int = 0,
    num_uncommitted: int = 0,
) -> dict[int, Tensor]:
    """Logits [tokens, vocab] of each slot's segment, in the order given: decoding ones, held ones, prompts."""
    positions = [starts[slot] + at for slot, tokens in rows.items() for at in range(len(tokens))]
    batch = PackedBatch(
        token_ids=torch.tensor([token for tokens in rows.values() for token in tokens]),
        positions=torch.tensor(positions),
        slots=torch.tensor([*rows]),
        lengths=tuple(map(len, rows.values())),
        num_decode=num_decode,
        logit_rows=torch.arange(len(positions)),
        num_uncommitted=num_uncommitted,
    )
    return dict(zip(rows, model(batch, state).split(batch.lengths), strict=True))


def one_by_one(model: FrozenModel, before: Tensor, tokens: list[int], start: int) -> tuple[Tensor, list[Tensor]]:
    """The naive twin: logits of single steps, and the slot's bytes before each and after the last."""
    state = StateBuffer(model.state_spec, 2)
    state.storage[1] = before
    logits, states = [], [before.clone()]
    for at, token in enumerate(tokens):
        inputs = {"slots": torch.tensor([1]), "positions": torch.tensor([start + at])}
        logits.append(decode(model, torch.tensor([token]), **inputs, state=state))
        states.append(state.storage[1].clone())
    return torch.cat(logits), states


@pytest.mark.parametrize(("name", "states"), KINDS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_held_slots_stay_and_go_on_by_any_count_to_the_bits_of_single_steps(
    name: str, states: torch.dtype, data: st.DataObject
) -> None:
    model = model_of(name, states)
    num_prompt = data.draw(st.integers(1, 90))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    counts = [data.draw(st.integers(0, length)) for length in lengths]
    num_decode, num_prompts = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 1))
    num_slots = num_decode + len(lengths) + num_prompts
    state = StateBuffer(model.state_spec, num_slots + 2)
    state.storage.fill_(POISON)
    slots = list(range(1, num_slots + 1))
    state.storage[1 : num_slots + 1] = 0
    texts = {slot: random_text(num_prompt + 9, seed=slot) for slot in slots}
    step(model, state, {slot: texts[slot][:num_prompt] for slot in slots}, dict.fromkeys(slots, 0))
    before = state.storage.clone()
    sizes = [*[1] * num_decode, *lengths, *[7] * num_prompts]
    rows = {slot: texts[slot][num_prompt : num_prompt + size] for slot, size in zip(slots, sizes, strict=True)}
    starts = dict.fromkeys(slots, num_prompt)
    logits = step(model, state, rows, starts, num_decode=num_decode, num_uncommitted=len(lengths))
    held = slots[num_decode : num_decode + len(lengths)]
    between = state.storage.clone()
    model.advance(counts, state)
    counted = dict(zip(held, counts, strict=True))
    for slot in slots:
        expected, states = one_by_one(model, before[slot], rows[slot], num_prompt)
        assert torch.equal(logits[slot], expected)
        assert torch.equal(between[slot], before[slot] if slot in held else states[-1])
        assert torch.equal(state.storage[slot], states[counted.get(slot, len(rows[slot]))])
    assert state.storage[[0, -1]].eq(POISON).all(), "nothing else was touched"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.usefixtures("threads_as_before")
def test_every_build_and_any_number_of_threads_does_the_same(variant: str, num_threads: int) -> None:
    library = load_variant(variant)
    if library is None:
        pytest.skip(f"{variant} is not for this CPU")
    torch.set_num_threads(num_threads)
    model = NativeModel(tiny_model(), library=library)
    state = StateBuffer(model.state_spec, 2)
    state.storage.zero_()
    text = random_text(60)
    step(model, state, {1: text[:50]}, {1: 0})
    expected, states = one_by_one(model, state.storage[1], text[50:], 50)
    assert torch.equal(step(model, state, {1: text[50:]}, {1: 50}, num_uncommitted=1)[1], expected)
    model.advance([4], state)
    assert torch.equal(state.storage[1], states[4])
    assert torch.equal(step(model, state, {1: text[54:]}, {1: 54}, num_uncommitted=1)[1], expected[4:])


def test_held_sequences_are_never_cut_between_blocks_of_rows() -> None:
    model = tiny_network()
    num_uncommitted, length = 60, 9  # 540 rows
    state = StateBuffer(model.state_spec, num_uncommitted + 2)
    state.storage.zero_()
    rows = {num_uncommitted + 1: [5]} | {slot: random_text(length, seed=slot) for slot in range(1, num_uncommitted + 1)}
    starts = dict.fromkeys(rows, 0)
    logits = step(model, state, rows, starts, num_decode=1, num_uncommitted=num_uncommitted)
    model.advance([slot % (length + 1) for slot in range(1, num_uncommitted + 1)], state)
    for slot in (1, 28, 29, 57, 60):
        expected, states = one_by_one(model, torch.zeros_like(state.storage[0]), rows[slot], 0)
        assert torch.equal(logits[slot], expected)
        assert torch.equal(state.storage[slot], states[slot % (length + 1)])


def test_a_row_of_nan_stays_alone() -> None:
    model = tiny_network()
    state = StateBuffer(model.state_spec, 3)
    state.storage.zero_()
    state.storage[1].fill_(POISON)
    rows = {1: random_text(4), 2: random_text(4, seed=1)}
    logits = step(model, state, rows, {1: 0, 2: 0}, num_uncommitted=2)
    assert not logits[1].isfinite().any()
    assert torch.equal(logits[2], one_by_one(model, torch.zeros_like(state.storage[0]), rows[2], 0)[0])


def test_only_the_kernels_hold_slots() -> None:
    model = tiny_network(native=False)
    assert not model.can_defer
    state = StateBuffer(model.state_spec, 2)
    state.storage.zero_()
    with pytest.raises(ValueError, match="compiled kernels"):
        step(model, state, {1: [5, 6]}, {1: 0}, num_uncommitted=1)
    assert tiny_network().can_defer
    with pytest.raises(ValueError, match="compiled kernels"):
        model.advance([1], state)


def test_as_many_rows_as_a_block_has_may_be_held() -> None:
    model = tiny_network()
    state = StateBuffer(model.state_spec, 2)
    state.storage.zero_()
    text = random_text(MAX_UNCOMMITTED_ROWS)
    expected = step(model, state, {1: text}, {1: 0})[1]
    after = state.storage[1].clone()
    state.storage.zero_()
    assert torch.equal(step(model, state, {1: text}, {1: 0}, num_uncommitted=1)[1], expected)
    model.advance([MAX_UNCOMMITTED_ROWS], state)
    assert torch.equal(state.storage[1], after)
