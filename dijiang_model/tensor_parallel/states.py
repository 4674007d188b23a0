"""Slots of a split network: one whole row of bytes taken apart for the ranks, and put together again.

A state is saved whole, as one process would have it, so that it can be opened with any number of ranks. Ranks exchange
rows of one length; those whose heads have fewer places than others' end in bytes that mean nothing.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dijiang_model.config import ModelConfig
from dijiang_model.families import build_model
from dijiang_model.state import ALIGNMENT_BYTES, StateSpec, StateTensor
from dijiang_model.tensor_parallel.shards import local_config

_FILLING = "filling"


def rank_specs(own: StateSpec, config: ModelConfig, *, size: int) -> tuple[StateSpec, ...]:
    """What a slot holds on each of `size` ranks: as many bytes everywhere.

    Args:
        own: of one of the ranks, as its network states it; the others have the same dtypes.
        config: of the whole network.
    """
    if all(layer.anchors is None for layer in config.layers):
        return (own,) * size
    shapes = [build_model(local_config(config, size, rank=rank)).state_spec.tensors for rank in range(size)]
    specs = [
        StateSpec(tuple(replace(tensor, shape=of.shape) for tensor, of in zip(own.tensors, rank, strict=True)))
        for rank in shapes
    ]
    longest = max(spec.bytes_per_slot for spec in specs)
    return tuple(_filled(spec, longest - spec.bytes_per_slot) for spec in specs)


def _filled(spec: StateSpec, num_bytes: int) -> StateSpec:
    assert num_bytes % ALIGNMENT_BYTES == 0
    return StateSpec((*spec.tensors, StateTensor(_FILLING, (num_bytes,), torch.uint8))) if num_bytes > 0 else spec


class StateParts:
    """How the bytes of a whole slot lie in those of the ranks."""

    def __init__(self, whole: StateSpec, parts: Sequence[StateSpec]) -> None:
        """
        Args:
            whole: of one process.
            parts: of each rank: the same tensors, a part of each in the first dimension (heads, their places).
        """
        self.whole, self.parts = whole, parts
        self._pieces: list[list[tuple[int, int, int]]] = []  # by rank: offset in the whole slot and in its, bytes
        starts = whole.offsets()
        for part in parts:
            pieces = []
            for name, offset, length in _tensors(part):
                pieces.append((starts[name], offset, length))
                starts[name] += length
            self._pieces.append(pieces)
        ends = {name: offset + length for name, offset, length in _tensors(whole)}
        assert starts == ends, "the parts' tensors make up the whole ones"

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """[part bytes] uint8 of each rank, in order -> [whole bytes], on their device."""
        row = parts[0].new_zeros(self.whole.bytes_per_slot)
        for part, pieces in zip(parts, self._pieces, strict=True):
            for whole, own, length in pieces:
                row[whole : whole + length] = part[own : own + length]
        return row

    def split(self, row: Tensor) -> list[Tensor]:
        """[whole bytes] uint8 -> [part bytes] for each rank, on its device."""
        parts = [torch.zeros(spec.bytes_per_slot, dtype=torch.uint8, device=row.device) for spec in self.parts]
        for part, pieces in zip(parts, self._pieces, strict=True):
            for whole, own, length in pieces:
                part[own : own + length] = row[whole : whole + length]
        return parts


def _tensors(spec: StateSpec) -> list[tuple[str, int, int]]:
    """Name, offset and bytes of each tensor that means something."""
    offsets = spec.offsets()
    return [(tensor.name, offsets[tensor.name], tensor.num_bytes) for tensor in spec.tensors if tensor.name != _FILLING]
