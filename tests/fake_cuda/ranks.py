"""A rank of a split network whose others say what it says itself: shapes and devices are those of true ranks."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dijiang_model.config import ModelConfig
from dijiang_model.families import build_model
from dijiang_model.tensor_parallel.network import ShardedModel, build_shard
from dijiang_model.tensor_parallel.states import StateParts
from server.engine.engine import Engine
from server.engine.loading import Network, assemble_engine
from server.engine.tensor_parallel.channel import Plan
from server.engine.tensor_parallel.slots import LeadingModel, LeadingPool
from server.engine.types.requests import EngineConfig
from tests.fake_cuda.engines import CUDA, on_device
from tests.fake_cuda.machine import Machine


class EchoGroup:
    """See `dijiang_model.tensor_parallel.group.TensorGroup`."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def all_reduce_(self, x: Tensor) -> Tensor:
        return x.mul_(self.size)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.size, dim=-1)

    def gather(self, x: Tensor) -> list[Tensor] | None:
        return [x.clone() for _ in range(self.size)] if self.rank == 0 else None

    def scatter(self, parts: Sequence[Tensor] | None, out: Tensor) -> Tensor:
        return out.zero_() if parts is None else out.copy_(parts[self.rank])

    def broadcast_(self, x: Tensor) -> Tensor:
        return x.clone()


class SilentRanks:
    """Nobody listens to the plans; see `server.engine.tensor_parallel.ranks.Ranks`."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []

    def tell(self, plan: Plan) -> None:
        self.plans.append(plan)


def leading_engine(config: ModelConfig, machine: Machine, folder: Path, *, size: int) -> Engine:
    """The engine of rank 0."""
    with machine.loading():
        whole = build_model(config, dtype=torch.bfloat16)
        local = on_device(build_shard(config, EchoGroup(0, size), dtype=torch.bfloat16))
        model, ranks = ShardedModel(local, config, EchoGroup(0, size)), SilentRanks()
        parts = StateParts(whole.state_spec, model.state_specs)
        pool = LeadingPool(parts, 3, CUDA, model=model, ranks=ranks)  # type: ignore[arg-type]
        network = Network(LeadingModel(model, ranks), pool, config, 0)  # type: ignore[arg-type]
        settings = EngineConfig(
            model_path=str(folder),
            device="cuda",
            weights_dtype="bfloat16",
            num_threads=1,
            state_memory_bytes=2**24,
            max_num_slots=3,
            max_step_tokens=48,
            max_waiting=100,
            states_folder=str(folder),
            tensor_parallel=size,
            prefix_cache_host_bytes=2**22,
            prefix_cache_min_tokens=8,
            prefix_cache_spacing=16,
        )
        return assemble_engine(network, settings)
