"""The recurrent state of a sequence: its description, and the memory that holds many of them.

A sequence on the device is one *slot*: a fixed set of named tensors. `StateSpec` names them, with
shapes and dtypes; `StateBuffer` holds `num_slots` of them in one allocation, slot after slot, so that
copying, saving or clearing a conversation is one contiguous copy of one row.
"""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One named tensor of a slot, e.g. `layers.3.linear_state` [G, K, V] fp32."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StateSpec:
    """Everything the rest of the system may know about a model's state.

    Attributes:
        tensors: in storage order; names are unique.
    """

    tensors: tuple[StateTensor, ...]

    def offsets(self) -> dict[str, int]:
        """Byte offset of each tensor in a slot, each aligned to `ALIGNMENT_BYTES`."""
        offsets, position = {}, 0
        for tensor in self.tensors:
            offsets[tensor.name] = position
            position += _aligned(tensor.num_bytes)
        return offsets

    @property
    def bytes_per_slot(self) -> int:
        """Memory of one conversation in bytes, alignment included; independent of its length."""
        return sum(_aligned(tensor.num_bytes) for tensor in self.tensors)


class StateBuffer:
    """`num_slots` states in one allocation.

    Attributes:
        spec: what a slot holds.
        storage: [P, bytes_per_slot] uint8, contiguous; row p is slot p.
        tensors: name -> view [P, *shape] of the spec's dtype into `storage` (strided over slots).
    """

    def __init__(
        self, spec: StateSpec, num_slots: int, device: torch.device | str = "cpu", *, cleared: bool = False
    ) -> None:
        """Allocates; without `cleared` a slot holds anything until `storage[slot].zero_()`.

        On a CPU cleared slots take memory from the system when they are first written.
        """
        self.spec = spec
        self.num_slots = num_slots
        shape = (num_slots, spec.bytes_per_slot)
        if cleared and torch.device(device).type == "cpu":
            self.storage = _pages(num_slots * spec.bytes_per_slot).view(shape)
        else:
            self.storage = torch.empty(shape, dtype=torch.uint8, device=device)
            if cleared:
                self.storage.zero_()
        offsets = spec.offsets()
        self.tensors: Mapping[str, Tensor] = {
            tensor.name: self.storage[:, offsets[tensor.name] : offsets[tensor.name] + tensor.num_bytes]
            .view(tensor.dtype)
            .unflatten(1, tensor.shape)
            for tensor in spec.tensors
        }


def _pages(num_bytes: int) -> Tensor:
    """[num_bytes] uint8 of zeros that the system provides page by page, on first use; aligned to pages."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping alive


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
