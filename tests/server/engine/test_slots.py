"""Slots are handed out once, and never the scratch slot."""

import pytest

from server.engine.slots import SlotAllocator


def test_hands_out_every_slot_but_scratch_once() -> None:
    slots = SlotAllocator(3)
    assert {slots.allocate() for _ in range(3)} == {1, 2, 3}
    assert slots.allocate() is None
    assert slots.num_free == 0


def test_a_freed_slot_is_handed_out_again() -> None:
    slots = SlotAllocator(2)
    first = slots.allocate()
    slots.allocate()
    assert first is not None
    slots.free(first)
    assert slots.num_free == 1
    assert slots.allocate() == first


@pytest.mark.parametrize("slot", [0, 1, 9, -1])
def test_freeing_what_is_not_in_use_is_an_error(slot: int) -> None:
    slots = SlotAllocator(2)
    with pytest.raises(ValueError, match=f"slot {slot} is not in use"):
        slots.free(slot)


def test_a_double_free_is_an_error() -> None:
    slots = SlotAllocator(2)
    slot = slots.allocate()
    assert slot is not None
    slots.free(slot)
    with pytest.raises(ValueError, match="not in use"):
        slots.free(slot)
    assert slots.num_free == 2


def test_an_allocator_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 slot"):
        SlotAllocator(0)
