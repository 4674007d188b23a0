"""Ranks of a split network as threads of one process: the arithmetic of a split, without processes."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from dijiang_model.config import ModelConfig
from dijiang_model.tensor_parallel.network import ShardedModel, build_shard
from dijiang_model.tensor_parallel.shards import Shard, part_of
from tests.waiting import PATIENCE_S

T = TypeVar("T")


class ThreadGroup:
    """One rank's view of a table on which all ranks lay their tensors; see `dijiang_model.tensor_parallel.group`."""

    def __init__(self, rank: int, table: list[list[Tensor]], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.size = len(table)
        self.num_sums = 0
        self._table = table
        self._barrier = barrier

    def _exchange(self, *tensors: Tensor) -> list[list[Tensor]]:
        self._table[self.rank] = [tensor.clone() for tensor in tensors]
        self._barrier.wait(PATIENCE_S)
        laid = [list(row) for row in self._table]
        self._barrier.wait(PATIENCE_S)
        return laid

    def all_reduce_(self, x: Tensor) -> Tensor:
        self.num_sums += 1
        return x.copy_(torch.stack([row[0] for row in self._exchange(x)]).sum(0))

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat([row[0] for row in self._exchange(x)], dim=-1)

    def gather(self, x: Tensor) -> list[Tensor] | None:
        laid = self._exchange(x)
        return [row[0] for row in laid] if self.rank == 0 else None

    def scatter(self, parts: Sequence[Tensor] | None, out: Tensor) -> Tensor:
        return out.copy_(self._exchange(*(parts or []))[0][self.rank])

    def broadcast_(self, x: Tensor) -> Tensor:
        return x.copy_(self._exchange(x)[0][0])


def on_ranks(size: int, work: Callable[[ThreadGroup], T]) -> list[T]:
    """What each rank's work returns; without gradients. A rank that fails breaks the others' wait."""
    table: list[list[Tensor]] = [[] for _ in range(size)]
    barrier = threading.Barrier(size)

    def run(rank: int) -> T:
        try:
            with torch.inference_mode():
                return work(ThreadGroup(rank, table, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def shard_of(tensors: dict[str, Tensor], config: ModelConfig, group: ThreadGroup) -> ShardedModel:
    """A rank's network with its parts of a whole network's tensors, in their dtype."""
    dtype = next(tensor.dtype for name, tensor in tensors.items() if ".linear." not in name)
    model = build_shard(config, group, dtype=dtype)
    wanted = model.state_dict()
    shard = Shard(group.rank, group.size)
    parts = {name: part_of(tensors[name], tuple(wanted[name].shape), shard) for name in wanted}
    model.load_state_dict({name: part.clone() for name, part in parts.items()}, strict=True, assign=True)
    model.prepare()
    return ShardedModel(model, config, group)
