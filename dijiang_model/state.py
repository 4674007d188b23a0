"""The recurrent state of a sequence: its description, and the memory that holds many of them.

A sequence on the device is one *slot*: a fixed set of named tensors. `StateSpec` names them, with
shapes and dtypes; `StateBuffer` holds `num_slots` of them in one allocation, slot after slot, so that
copying, saving or clearing a conversation is one contiguous copy of one row.
"""

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

    def __init__(self, spec: StateSpec, num_slots: int, device: torch.device | str = "cpu") -> None:
        """Allocates without clearing: a slot holds anything until `storage[slot].zero_()`."""
        self.spec = spec
        self.num_slots = num_slots
        self.storage = torch.empty((num_slots, spec.bytes_per_slot), dtype=torch.uint8, device=device)
        offsets = spec.offsets()
        self.tensors: Mapping[str, Tensor] = {
            tensor.name: self.storage[:, offsets[tensor.name] : offsets[tensor.name] + tensor.num_bytes]
            .view(tensor.dtype)
            .unflatten(1, tensor.shape)
            for tensor in spec.tensors
        }


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
