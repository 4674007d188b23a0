"""Slots as bytes: cleared, copied, saved and brought back, each without touching another."""

import pytest
import torch

from dijiang_model.state import StateSpec, StateTensor
from server.engine.state.pool import StateBudgetError, StatePool, num_slots_for

SPEC = StateSpec((StateTensor("a", (3, 2), torch.float32), StateTensor("b", (5,), torch.int64)))


def filled_pool() -> StatePool:
    pool = StatePool(SPEC, 3)
    pool.buffer.storage.copy_(torch.arange(4)[:, None].expand(4, pool.bytes_per_slot))
    return pool


def test_a_new_pool_is_clear_and_has_a_scratch_slot() -> None:
    pool = StatePool(SPEC, 3)
    assert pool.buffer.num_slots == 4
    assert not pool.buffer.storage.any()


def test_reset_clears_one_slot() -> None:
    pool = filled_pool()
    pool.reset(2)
    assert pool.buffer.storage.amax(dim=1).tolist() == [0, 1, 0, 3]


def test_copy_makes_the_target_the_source() -> None:
    pool = filled_pool()
    pool.copy(3, target=1)
    assert pool.buffer.storage.amin(dim=1).tolist() == [0, 3, 2, 3]


def test_a_snapshot_comes_back_into_any_slot_and_is_independent_of_its_own() -> None:
    pool = filled_pool()
    snapshot = pool.snapshot(2)
    pool.reset(2)
    pool.restore(1, snapshot)
    assert pool.buffer.storage.amax(dim=1).tolist() == [0, 2, 0, 3]
    assert torch.equal(pool.buffer.tensors["b"][1], snapshot.view(torch.int64)[8:13])


@pytest.mark.parametrize("snapshot", [torch.zeros(3, dtype=torch.uint8), torch.zeros(128, dtype=torch.float32)])
def test_a_snapshot_that_does_not_fit_is_refused(snapshot: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="a snapshot of this model is 128 bytes"):
        filled_pool().restore(1, snapshot)


@pytest.mark.parametrize("slot", [0, 4, -1])
def test_the_scratch_slot_and_slots_that_are_not_there_cannot_be_used(slot: int) -> None:
    with pytest.raises(AssertionError, match="is not one of 1 to 3"):
        filled_pool().reset(slot)


@pytest.mark.parametrize(("budget_bytes", "num_slots"), [(256, 1), (383, 1), (384, 2), (10_000, 5)])
def test_the_budget_holds_the_scratch_slot_too(budget_bytes: int, num_slots: int) -> None:
    assert SPEC.bytes_per_slot == 128
    assert num_slots_for(SPEC, budget_bytes=budget_bytes, max_num_slots=5) == num_slots


@pytest.mark.parametrize(("budget_bytes", "max_num_slots"), [(255, 5), (0, 5), (10_000, 0)])
def test_a_budget_for_nobody_is_an_error_with_its_numbers(budget_bytes: int, max_num_slots: int) -> None:
    with pytest.raises(StateBudgetError, match=f"{budget_bytes:,} bytes of state memory .* one takes 128 bytes"):
        num_slots_for(SPEC, budget_bytes=budget_bytes, max_num_slots=max_num_slots)
