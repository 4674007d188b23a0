"""Attention that several threads share: logits and states are those of one thread, or of one row, bit for bit."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dijiang_model.config import ModelConfig
from dijiang_model.native.library import load_library
from dijiang_model.serving.network import FrozenModel, freeze
from tests.dijiang_model.stepping import Stepper, random_text
from tests.tiny_models import HYBRID, PURE, anchored, gpt_neox_config, llama_config, tiny_model

pytestmark = pytest.mark.skipif(load_library() is None, reason="the kernels were not built: no compiler at install")
CONFIGS: dict[str, ModelConfig] = {
    "window": llama_config(HYBRID, PURE),
    "anchors": llama_config(anchored(2), anchored(2)),
    "anchors, one group": llama_config(anchored(1), num_heads=2, num_kv_heads=1),
    "gpt_neox": gpt_neox_config(HYBRID),
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> FrozenModel:
    return freeze(tiny_model(CONFIGS[request.param]))


def fed(model: FrozenModel, *, threads: int) -> tuple[Stepper, list[dict[int, Tensor]]]:
    """Two long prompts and one that is not, beside a decoding row; then more rows than go together."""
    torch.set_num_threads(threads)
    stepper = Stepper(model).open(1, 2, 3, 4)
    stepper.step({4: random_text(5, seed=4)})
    prompts = {1: random_text(150), 2: random_text(30, seed=2), 3: random_text(65, seed=3)}
    return stepper, [stepper.step(prompts, decode={4: 7}), stepper.step({1: random_text(290, seed=5)})]


@pytest.mark.parametrize("threads", [2, 3, 4, 7])
def test_any_number_of_threads_leaves_the_same_logits_and_states(threads: int, model: FrozenModel) -> None:
    assert model.decode_path == "native"
    (alone, expected), (shared, found) = fed(model, threads=1), fed(model, threads=threads)
    for ours, theirs in zip(found, expected, strict=True):
        for slot, logits in theirs.items():
            assert torch.equal(ours[slot], logits), slot
    for slot in (1, 2, 3, 4):
        for name, tensor in alone.state(slot).items():
            assert torch.equal(shared.state(slot)[name], tensor), (slot, name)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_rows_leave_what_each_leaves_by_itself(threads: int, model: FrozenModel) -> None:
    slots = range(1, 38)  # so many that a task has several groups in a row, and the last one fewer
    torch.set_num_threads(threads)
    alone, beside = (Stepper(model, num_slots=38).open(*slots) for _ in range(2))
    for position in range(3):
        tokens = {slot: (7 * slot + position) % 256 for slot in slots}
        found = beside.step(decode=tokens)
        for slot, token in tokens.items():
            assert torch.equal(found[slot], alone.step(decode={slot: token})[slot]), (position, slot)
    assert torch.equal(beside.buffer.storage[1:], alone.buffer.storage[1:])
