"""The slots' memory: one row of bytes for each conversation, opaque to everything but the model.

Slot 0 is scratch for padding rows. A slot is cleared before its first token *and* when it is given
back, so that nobody's conversation is left lying in memory.
"""

import torch
from torch import Tensor

from dijiang_model.state import StateBuffer, StateSpec
from server.engine.slots import SCRATCH_SLOT


class StateBudgetError(ValueError):
    """The memory for states does not hold a single conversation."""


def num_slots_for(spec: StateSpec, *, budget_bytes: int, max_num_slots: int) -> int:
    """How many conversations a budget holds, the scratch slot taken off; at most `max_num_slots`.

    Raises:
        StateBudgetError: not even one.
    """
    num_slots = min(budget_bytes // spec.bytes_per_slot - 1, max_num_slots)
    if num_slots < 1:
        raise StateBudgetError(
            f"{budget_bytes:,} bytes of state memory and at most {max_num_slots} slots hold no conversation: "
            f"one takes {spec.bytes_per_slot:,} bytes, and a scratch slot of the same size is needed beside it"
        )
    return num_slots


class StatePool:
    """The device tensors of slots 0 .. num_slots; see `dijiang_model.state.StateBuffer`."""

    def __init__(self, spec: StateSpec, num_slots: int, device: torch.device | str = "cpu") -> None:
        """Allocates `num_slots` slots and the scratch slot, all cleared."""
        self.num_slots = num_slots
        self.buffer = StateBuffer(spec, num_slots + 1, device, cleared=True)

    @property
    def spec(self) -> StateSpec:
        """What a snapshot of a slot holds."""
        return self.buffer.spec

    @property
    def bytes_per_slot(self) -> int:
        return self.spec.bytes_per_slot

    def reset(self, slot: int) -> None:
        """Clears a slot: the state before the first token."""
        self._row(slot).zero_()

    def copy(self, source: int, *, target: int) -> None:
        """Makes the target slot the same conversation as the source slot."""
        self._row(target).copy_(self._row(source))

    def take(self, slot: int) -> Tensor:
        """A copy of a slot on its own device, [bytes_per_slot] uint8; not waited for."""
        return self._row(slot).clone()

    def snapshot(self, slot: int) -> Tensor:
        """A host copy of a slot, [bytes_per_slot] uint8; waits for the device."""
        return self._row(slot).to("cpu", copy=True)

    def restore(self, slot: int, snapshot: Tensor) -> None:
        """Puts a snapshot of the same model into a slot; not waited for.

        Raises:
            ValueError: the snapshot is not [bytes_per_slot] uint8.
        """
        self._require_row(snapshot)
        self._row(slot).copy_(snapshot, non_blocking=True)

    def _require_row(self, snapshot: Tensor) -> None:
        if snapshot.dtype != torch.uint8 or snapshot.shape != (self.bytes_per_slot,):
            raise ValueError(
                f"a snapshot of this model is {self.bytes_per_slot:,} bytes, "
                f"not {list(snapshot.shape)} of {snapshot.dtype}"
            )

    def _row(self, slot: int) -> Tensor:
        assert SCRATCH_SLOT < slot <= self.num_slots, f"slot {slot} is not one of 1 to {self.num_slots}"
        return self.buffer.storage[slot]
