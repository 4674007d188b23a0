"""An engine whose network is split over several processes (docs/parallel.md).

This process is rank 0: it schedules, samples and keeps everything that knows of requests; to all of that the split
network is one model with one pool of slots. The other ranks only compute.
"""

import os
import sys
import time

import torch

from dijiang_model.checkpoints import load_config, load_quantization
from dijiang_model.families import build_model
from dijiang_model.parallel.group import DistributedGroup
from dijiang_model.parallel.loading import load_shard
from dijiang_model.parallel.shards import local_config
from dijiang_model.parallel.states import StateParts
from server.engine.engine import Engine
from server.engine.loading import Network, assemble_engine, slots_of
from server.engine.parallel_channel import JoinGroup
from server.engine.parallel_ranks import Ranks
from server.engine.parallel_slots import LeadingModel, LeadingPool
from server.engine.placement import device_of, num_threads_of, select_device, weights_dtype
from server.engine.types import EngineConfig


def load_parallel_engine(config: EngineConfig) -> Engine:
    """Starts the other ranks and loads this one's part; sets this process's number of tensor threads.

    Raises:
        As `server.engine.loading.load_engine`; also for what another rank could not load.
        server.engine.parallel_ranks.RankDiedError: the process of a rank ended while it loaded.
    """
    started = time.monotonic()
    dtype, size = weights_dtype(config), config.tensor_parallel
    if config.weights_dtype in ("int8", "int4") or load_quantization(config.model_path) is not None:
        raise ValueError("int8 and int4 weights cannot be split over ranks; float32, bfloat16 and float16 can")
    whole_config = load_config(config.model_path)
    local_config(whole_config, size)  # refuses what cannot be split, before anything is started
    whole = build_model(whole_config, dtype=dtype)
    torch.set_num_threads(num_threads_of(config))
    device = torch.device(device_of(config, 0))
    for rank in range(size):
        select_device(device_of(config, size - 1 - rank))  # this one's last
    num_slots = slots_of(whole.state_spec, config)
    if sys.platform == "linux":  # the ranks' sockets are for this machine alone
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks = Ranks(config)
    try:
        group = DistributedGroup(0, size)
        model = load_shard(config.model_path, group, device=device, dtype=dtype)
        ranks.wait_loaded()
        ranks.watch()
        ranks.tell(JoinGroup(num_slots))
        parts = StateParts(whole.state_spec, model.local.state_spec, size=size)
        pool = LeadingPool(parts, num_slots, device, model=model, ranks=ranks)
        group.connect(device, ranks.meeting_point)
    except BaseException:
        ranks.close()
        raise
    network = Network(LeadingModel(model, ranks), pool, whole_config, whole.num_parameters)
    return assemble_engine(network, config, started=started)
