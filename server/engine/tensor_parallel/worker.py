"""The process of a rank beside the engine's: `python -m server.engine.tensor_parallel.worker DESCRIPTOR`.

It loads its part of the model, then does what rank 0 plans, in order. It has no clients, no sampler and no schedule. It
ends with rank 0, whichever way that went, and a failure here ends rank 0 (`server.engine.tensor_parallel.ranks`).
"""

import gc
import logging
import os
import shutil
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from dijiang_model.tensor_parallel.group import DistributedGroup
from dijiang_model.tensor_parallel.loading import load_shard
from dijiang_model.tensor_parallel.network import ShardedModel
from server.engine.failures import EXIT_LOAD_FAILED, EXIT_STEP_FAILED, LineHandler, is_permanent, log_failure, reason_of
from server.engine.placement import device_of, num_threads_of, select_device, weights_dtype, weights_kind
from server.engine.tensor_parallel.channel import (
    CopySlot,
    JoinGroup,
    Plan,
    RankFailed,
    RankLoaded,
    ResetSlot,
    RestoreSlot,
    StartRank,
    Step,
    TakeSlot,
    encode,
    next_plan,
)
from server.engine.tensor_parallel.ranks import meeting_point
from server.engine.tensor_parallel.slots import FollowingPool, shared_batch

_PATIENCE_S = 1.0


class RankLoop:
    """Moves plans into a rank's part of the network."""

    def __init__(self, model: ShardedModel, pool: FollowingPool, device: torch.device) -> None:
        self._model = model
        self._pool = pool
        self._device = device

    @torch.inference_mode()
    def obey(self, plan: Plan) -> None:
        """Does one thing; collective operations wait for the other ranks."""
        match plan:
            case Step():
                self._model(shared_batch(plan, self._model, self._device), self._pool.buffer)
            case ResetSlot(slot):
                self._pool.reset(slot)
            case CopySlot(source, target):
                self._pool.copy(source, target=target)
            case TakeSlot(slot):
                self._pool.give(slot, self._model)
            case RestoreSlot(slot):
                self._pool.receive(slot, self._model)
            case StartRank() | JoinGroup():
                raise AssertionError("these come once, before the loop")


def run(connection: "Connection[bytes, bytes]") -> int:
    """Loads, reports, obeys; returns the exit status, for it only ends by failing or with rank 0."""
    try:
        start = next_plan(connection)
        assert isinstance(start, StartRank)
        threading.Thread(target=_end_with_leader, args=(start.folder,), daemon=True).start()
        try:
            model, device = _load(start)
        except Exception as error:
            log_failure("engine_rank_load_failed", error)
            connection.send_bytes(encode(RankFailed(reason_of(error), is_permanent(error))))
            return EXIT_LOAD_FAILED
        connection.send_bytes(encode(RankLoaded()))
        loop = _join(connection, model, device, start)
        gc.freeze()
        while True:
            loop.obey(next_plan(connection))
    except EOFError:
        _let_the_leader_go_first()
        return 0
    except Exception as error:
        _let_the_leader_go_first()
        log_failure("engine_rank_failed", error)
        return EXIT_STEP_FAILED


def _load(start: StartRank) -> tuple[ShardedModel, torch.device]:
    config = start.config
    torch.set_num_threads(num_threads_of(config))
    device = select_device(device_of(config, start.rank))
    group = DistributedGroup(start.rank, config.tensor_parallel)
    dtype, kind = weights_dtype(config), weights_kind(config)
    return load_shard(config.model_path, group, device=device, dtype=dtype, weights=kind), device


def _join(
    connection: "Connection[bytes, bytes]", model: ShardedModel, device: torch.device, start: StartRank
) -> RankLoop:
    join = next_plan(connection)
    assert isinstance(join, JoinGroup)
    pool = FollowingPool(model.state_spec, join.num_slots, device)
    assert isinstance(model.group, DistributedGroup)
    model.group.connect(device, meeting_point(Path(start.folder)))
    return RankLoop(model, pool, device)


def _let_the_leader_go_first() -> None:
    """What fails because rank 0 is gone is no failure of this rank: `_end_with_leader` ends it, and tidies up."""
    threading.Event().wait(_PATIENCE_S)


def _end_with_leader(folder: str) -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # at once, from whatever the main thread is doing


def main() -> int:
    """Entry point of the process; the descriptor of the socket to rank 0 is the only argument."""
    logging.basicConfig(handlers=[LineHandler()], level=logging.WARNING)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return run(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    sys.exit(main())
