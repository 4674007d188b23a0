"""Which engines record their decode steps: those whose network runs on one CUDA device in this process."""

from collections.abc import Callable

import torch
from torch import Tensor

from server.engine.fast_steps import graph_sampling
from server.engine.fast_steps.graphs import CudaCapture, DecodeGraphs, Model, row_buckets
from server.engine.state.pool import StatePool


def capturer(
    model: Model, *, pool: StatePool, vocab_size: int, device: torch.device
) -> Callable[[Tensor], DecodeGraphs] | None:
    """What a `ModelRunner` makes its captured steps with; None: this device has none.

    Recording a step takes about as long as some steps, once for each number of rows, before the engine is ready.
    """
    if device.type != "cuda":
        return None

    def record(last_token_ids: Tensor) -> DecodeGraphs:
        graphs = DecodeGraphs(
            model,
            buffer=pool.buffer,
            last_token_ids=last_token_ids,
            buckets=row_buckets(pool.num_slots),
            capture=CudaCapture(),
        )
        graph_sampling.record(graphs, vocab_size)
        return graphs

    return record
