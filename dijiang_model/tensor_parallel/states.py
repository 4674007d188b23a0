"""Slots of a split network: one whole row of bytes taken apart for the ranks, and put together again.

A state is saved whole, as one process would have it, so that it can be opened with any number of ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dijiang_model.state import StateSpec


class StateParts:
    """How the bytes of a whole slot lie in those of the ranks."""

    def __init__(self, whole: StateSpec, part: StateSpec, *, size: int) -> None:
        """
        Args:
            whole: of one process.
            part: of each of the ranks: the same tensors, each a `size`-th in its first dimension (heads).
            size: number of ranks.
        """
        self.whole, self.part, self._size = whole, part, size
        whole_offsets, part_offsets = whole.offsets(), part.offsets()
        self._pieces: list[tuple[int, int, int]] = []  # offset in the whole slot and in a part, bytes in a part
        for all_heads, own in zip(whole.tensors, part.tensors, strict=True):
            assert all_heads.name == own.name
            assert all_heads.shape == (own.shape[0] * size, *own.shape[1:])
            self._pieces.append((whole_offsets[own.name], part_offsets[own.name], own.num_bytes))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """[part bytes] uint8 of each rank, in order -> [whole bytes], on their device."""
        row = parts[0].new_zeros(self.whole.bytes_per_slot)
        for whole, own, length in self._pieces:
            for rank, part in enumerate(parts):
                row[whole + rank * length : whole + (rank + 1) * length] = part[own : own + length]
        return row

    def split(self, row: Tensor) -> list[Tensor]:
        """[whole bytes] uint8 -> [part bytes] for each rank, on its device."""
        parts = list(torch.zeros((self._size, self.part.bytes_per_slot), dtype=torch.uint8, device=row.device))
        for whole, own, length in self._pieces:
            for rank, part in enumerate(parts):
                part[own : own + length] = row[whole + rank * length : whole + (rank + 1) * length]
        return parts
