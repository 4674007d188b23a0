"""Training on several devices: processes that each take their share of every batch and average their gradients.

Launchers such as `torchrun` (and `accelerate launch`, which uses it) start the processes and tell each its place by
environment variables. All processes do the same steps on the same weights: together they do just what one process
does with the whole batch.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed

from dijiang_model.errors import ConversionError

TIMEOUT = timedelta(hours=12)
"""For a peer that is behind: the first one may be writing answers (`--self-distill`) for hours."""


class ProcessGroup:
    """The processes of a run as one of them sees them; this one is alone.

    Attributes:
        rank: place of this process, from 0.
        num: of processes.
    """

    rank = 0
    num = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their means over all processes, in place; all must bring the same shapes."""

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces tensors by those of the first process, in place."""

    def broadcast_number(self, value: float) -> float:
        """The number that the first process brings."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether any process brings True."""
        return flag


ALONE = ProcessGroup()


class DistributedProcessGroup(ProcessGroup):
    """Processes of a torch process group, which must be initialised."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.num = distributed.get_rank(), distributed.get_world_size()
        self._device = device

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """See `ProcessGroup`. One message for all tensors of a dtype."""
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            chosen = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in chosen])
            distributed.all_reduce(flat)
            flat /= self.num
            for tensor, mean in zip(chosen, flat.split([tensor.numel() for tensor in chosen]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            whole = tensor.contiguous()
            distributed.broadcast(whole, src=0)
            tensor.copy_(whole)

    def broadcast_number(self, value: float) -> float:
        number = torch.tensor([value], dtype=torch.float64, device=self._device)
        distributed.broadcast(number, src=0)
        return float(number)

    def any(self, flag: bool) -> bool:
        number = torch.tensor([int(flag)], device=self._device)
        distributed.all_reduce(number, op=distributed.ReduceOp.MAX)
        return bool(number)


@contextmanager
def joined(device: str) -> Iterator[tuple[ProcessGroup, str]]:
    """The processes that a launcher started beside this process, and the device of this one.

    Args:
        device: of the run: `cpu`, or `cuda`, of which each process takes its own.

    Raises:
        ConversionError: more than one process, and a device with a number or one that is not there.
    """
    num = int(os.environ.get("WORLD_SIZE", "1"))
    if num == 1:
        yield ALONE, device
        return
    if device not in ("cpu", "cuda"):
        raise ConversionError(f"{num} processes share --device cpu or cuda, each takes its own; not {device}")
    place = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        if place >= torch.cuda.device_count():
            raise ConversionError(f"process {place} of this machine has no GPU: there are {torch.cuda.device_count()}")
        device = f"cuda:{place}"
        torch.cuda.set_device(place)
    distributed.init_process_group("gloo" if device == "cpu" else "nccl", timeout=TIMEOUT)
    try:
        yield DistributedProcessGroup(torch.device(device)), device
    finally:
        distributed.destroy_process_group()
