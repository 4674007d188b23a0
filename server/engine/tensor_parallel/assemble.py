"""An engine whose network is split over several processes (docs/parallel.md).

This process is rank 0: it schedules, samples and keeps everything that knows of requests; to all of that the split
network is one model with one pool of slots. The other ranks only compute.
"""

import os
import sys
import time
from pathlib import Path

import torch

from dijiang_model.checkpoints.checkpoint import open_network
from dijiang_model.tensor_parallel.group import DistributedGroup
from dijiang_model.tensor_parallel.loading import load_shard
from dijiang_model.tensor_parallel.shards import local_config
from dijiang_model.tensor_parallel.states import StateParts
from server.engine.engine import Engine
from server.engine.loading import Network, as_stored, assemble_engine, slots_of
from server.engine.placement import (
    device_of,
    num_threads_of,
    require_device,
    select_device,
    weights_dtype,
    weights_kind,
)
from server.engine.tensor_parallel.channel import JoinGroup
from server.engine.tensor_parallel.ranks import Ranks
from server.engine.tensor_parallel.slots import LeadingModel, LeadingPool
from server.engine.types.requests import EngineConfig


def load_parallel_engine(config: EngineConfig) -> Engine:
    """Starts the other ranks and loads this one's part; sets this process's number of tensor threads.

    Raises:
        As `server.engine.loading.load_engine`; also for what another rank could not load.
        server.engine.tensor_parallel.ranks.RankDiedError: the process of a rank ended while it loaded.
    """
    started = time.monotonic()
    dtype, kind, size = weights_dtype(config), weights_kind(config), config.tensor_parallel
    checkpoint, whole = open_network(Path(config.model_path), dtype=dtype, weights=kind)
    local_config(whole.config, size, checkpoint.quantization)  # refuses, before anything is started
    torch.set_num_threads(num_threads_of(config))
    require_device(device_of(config, size - 1))
    device = select_device(device_of(config, 0))
    num_slots = slots_of(whole.state_spec, config)
    if sys.platform == "linux":  # the ranks' sockets are for this machine alone
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks = Ranks(config)
    try:
        group = DistributedGroup(0, size)
        model = load_shard(config.model_path, group, device=device, dtype=dtype, weights=kind)
        ranks.wait_loaded()
        ranks.watch()
        ranks.tell(JoinGroup(num_slots))
        parts = StateParts(whole.state_spec, model.state_specs)
        pool = LeadingPool(parts, num_slots, device, model=model, ranks=ranks)
        group.connect(device, ranks.meeting_point)
    except BaseException:
        ranks.close()
        raise
    is_quantized = checkpoint.quantization is not None
    network = Network(LeadingModel(model, ranks), pool, whole.config, whole.num_parameters, is_quantized=is_quantized)
    return assemble_engine(network, as_stored(config, checkpoint.quantization), started=started)
