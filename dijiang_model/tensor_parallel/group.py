"""The ranks of a split network and what they tell each other, over torch.distributed."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=30)
"""Longest silence of a rank that is alive; one that died is noticed otherwise (`server.engine.tensor_parallel`)."""


class TensorGroup(Protocol):
    """Collective operations: every rank calls the same ones in the same order, on tensors of its own device."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce_(self, x: Tensor) -> Tensor:
        """Adds up the ranks' tensors, in place; every rank gets the same sum."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[T, w] of each rank -> [T, size * w] on every rank, in the order of the ranks."""
        ...

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """Equally shaped tensors of all ranks for rank 0; None on the others."""
        ...

    def scatter(self, parts: Sequence[Tensor] | None, out: Tensor) -> Tensor:
        """Gives each rank one of the parts that rank 0 has, each shaped as `out`, which is filled and returned."""
        ...

    def broadcast_(self, x: Tensor) -> Tensor:
        """Fills the others' tensors with rank 0's."""
        ...


class DistributedGroup:
    """The default process group of this process."""

    def __init__(self, rank: int, size: int) -> None:
        """A group to be; `connect` before the first operation."""
        self.rank = rank
        self.size = size

    def connect(self, device: torch.device, meeting_point: Path) -> None:
        """Meets the other ranks; returns once all of them are there.

        Args:
            device: of the tensors: NCCL between CUDA devices, gloo between CPUs.
            meeting_point: a file that all ranks can write, in a folder of theirs alone; must not exist before.
        """
        is_cuda = device.type == "cuda"
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            init_method=meeting_point.absolute().as_uri(),
            rank=self.rank,
            world_size=self.size,
            timeout=TIMEOUT,
            device_id=device if is_cuda else None,
        )
        self.all_reduce_(torch.zeros(1, device=device))  # NCCL makes its channels at the first operation

    def all_reduce_(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=-1)

    def gather(self, x: Tensor) -> list[Tensor] | None:
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x.contiguous(), parts)
        return parts

    def scatter(self, parts: Sequence[Tensor] | None, out: Tensor) -> Tensor:
        dist.scatter(out, None if parts is None else list(parts))
        return out

    def broadcast_(self, x: Tensor) -> Tensor:
        dist.broadcast(x, 0)
        return x
