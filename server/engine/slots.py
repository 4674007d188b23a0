"""Which state slots are free. Slot 0 is scratch for padding rows and is never handed out."""

SCRATCH_SLOT = 0


class SlotAllocator:
    """Hands out the slots 1 .. num_slots, most recently freed first (its memory is the warmest)."""

    def __init__(self, num_slots: int) -> None:
        """
        Args:
            num_slots: slots to hand out, >= 1, the scratch slot not counted.

        Raises:
            ValueError: there is nothing to hand out.
        """
        if num_slots < 1:
            raise ValueError(f"a slot allocator needs at least 1 slot, not {num_slots}")
        self.num_slots = num_slots
        self._free = list(range(num_slots, SCRATCH_SLOT, -1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        """Slots that `allocate` can still hand out."""
        return len(self._free)

    def allocate(self) -> int | None:
        """A free slot, now the caller's; None when all are in use."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._used.add(slot)
        return slot

    def free(self, slot: int) -> None:
        """Gives a slot back.

        Raises:
            ValueError: the slot is not in use: a double free, the scratch slot, or no slot at all.
        """
        if slot not in self._used:
            raise ValueError(f"slot {slot} is not in use and cannot be freed")
        self._used.remove(slot)
        self._free.append(slot)
