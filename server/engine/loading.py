"""From a configuration to a running engine: the model, the memory for its states, and what goes with them."""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.config import ModelConfig
from dijiang_model.formats.tensor_files import SAFETENSORS_DTYPES
from dijiang_model.quantization.config import Quantization
from dijiang_model.serving.network import FrozenModel, freeze
from dijiang_model.state import StateSpec
from server.engine.engine import Engine
from server.engine.fairness.step_times import StepTimes
from server.engine.fast_steps.capture import capturer
from server.engine.fast_steps.decode_rows import Decode
from server.engine.grammars.grammar import GrammarCompiler
from server.engine.grammars.queue import GrammarQueue
from server.engine.placement import device_name, numbers_of, select_device, state_dtype, weights_dtype, weights_kind
from server.engine.runner import Advance, Model, ModelRunner
from server.engine.sampling.sampler import Sampler
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.speculation.rules import Speculation, speculation_of
from server.engine.state.fingerprint import model_fingerprint
from server.engine.state.norm import StateNorm
from server.engine.state.pool import StatePool, num_slots_for
from server.engine.state.prefix_cache import PrefixCache
from server.engine.state.prefix_disk import PrefixDisk
from server.engine.state.snapshot_files import Bytes
from server.engine.state.snapshots import CachePolicy, Snapshots
from server.engine.state.watch import StateWatch
from server.engine.types.requests import EngineConfig, EngineInfo
from server.engine.types.state import StateLayout, StateTensorLayout

_SCORING_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""Logits of prompt tokens in one step: as large as is still a good chunk of a prompt."""


@dataclass(frozen=True, slots=True)
class Network:
    """What an engine is built around.

    Attributes:
        run: a step of the model.
        pool: its slots.
        config: of the model.
        num_parameters: numbers in it.
        advance: moves on slots that a step has held; None: it can hold none.
        decode: prepares steps in which every sequence decodes; None: each is made anew.
        is_quantized: whether its weights are codes.
        can_capture: whether its steps run in this process alone, so that they can be captured on a CUDA device.
        steps, kernels, slow_because: for `EngineInfo`.
    """

    run: Model
    pool: StatePool
    config: ModelConfig
    num_parameters: int
    advance: Advance | None = None
    decode: Decode | None = None
    is_quantized: bool = False
    can_capture: bool = False
    steps: Literal["native", "triton", "torch"] = "torch"
    kernels: str = ""
    slow_because: str | None = None


def load_engine(config: EngineConfig) -> Engine:
    """Loads a model into this process and takes the memory for its states. Sets its number of tensor threads.

    Raises:
        dijiang_model.errors.ModelError: the model's files or configuration cannot be served.
        server.engine.state.pool.StateBudgetError: the state memory holds no conversation.
        ValueError: an unknown dtype, or a device that is not there.
    """
    started = time.monotonic()
    dtype = weights_dtype(config)
    torch.set_num_threads(config.num_threads)
    select_device(config.device)
    model = load_model(config.model_path, device=config.device, dtype=dtype, weights=weights_kind(config))
    if config.state_dtype != "float32":
        model.keep_states_in(state_dtype(config))
    return build_engine(freeze(model), as_stored(config, model.quantization), started=started)


def as_stored(config: EngineConfig, quantization: Quantization | None) -> EngineConfig:
    """A config that says how the weights are rounded, which was perhaps not asked for."""
    return config if quantization is None else replace(config, weights_dtype=quantization.weights)


def build_engine(model: FrozenModel, config: EngineConfig, *, started: float | None = None) -> Engine:
    """An engine around a model that is on the configured device already.

    Args:
        model: on that device.
        config: its device, memory and limits count here.
        started: `time.monotonic()` before the model was loaded, for `EngineInfo.load_s`.

    Raises:
        server.engine.state.pool.StateBudgetError: the state memory holds no conversation.
    """
    pool = StatePool(model.state_spec, slots_of(model.state_spec, config), torch.device(config.device))
    network = Network(
        model,
        pool,
        model.config,
        model.num_parameters,
        advance=model.advance if model.can_defer else None,
        decode=model.decoding if pool.buffer.storage.device.type == "cpu" else None,
        is_quantized=model.quantization is not None,
        can_capture=True,
        steps=model.decode_path,
        kernels=model.kernels,
        slow_because=model.slow_because,
    )
    return assemble_engine(network, config, started=started)


def slots_of(spec: StateSpec, config: EngineConfig) -> int:
    """How many conversations an engine has memory for.

    Raises:
        server.engine.state.pool.StateBudgetError: the budget does not hold one slot.
    """
    # No more sequences than tokens in a step, or decoding could starve (see the scheduler).
    max_num_slots = min(config.max_num_slots, config.max_step_tokens)
    return num_slots_for(spec, budget_bytes=config.state_memory_bytes, max_num_slots=max_num_slots)


def assemble_engine(network: Network, config: EngineConfig, *, started: float | None = None) -> Engine:
    """An engine around a network that is ready to run; see `build_engine`."""
    started = time.monotonic() if started is None else started
    speculation = speculation_of(
        config.max_drafts, can_defer=network.advance is not None, is_quantized=network.is_quantized
    )
    pool, device = network.pool, torch.device(config.device)
    num_ahead = 1 if device.type == "cuda" else 0
    vocab_size, eos_token_ids = network.config.vocab_size, network.config.eos_token_ids
    sampler = Sampler(vocab_size, eos_token_ids, device)
    fingerprint = model_fingerprint(network.config, Path(config.model_path), numbers=numbers_of(config))
    layout = state_layout(pool.spec, vocab_size, fingerprint)
    snapshots = _snapshots(PoolAccess(pool), layout, config)
    model_path = Path(config.model_path)
    grammars = GrammarQueue(
        partial(GrammarCompiler.load, model_path, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
    )
    scheduler = Scheduler(
        num_slots=pool.num_slots,
        max_step_tokens=config.max_step_tokens,
        max_waiting=config.max_waiting,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        max_scored_tokens=max(1, _SCORING_BYTES[device.type] // (4 * vocab_size)),
        speculation=speculation,
        max_unseen=num_ahead,
        reserved_waiting=config.reserved_waiting,
        max_parked=config.preemption_bytes // pool.spec.bytes_per_slot,
        step_times=StepTimes(config.target_gap_ms / 1000) if num_ahead == 0 and config.target_gap_ms > 0 else None,
        on_admission=lambda sequence: _begin(sequence, snapshots, grammars),
    )
    record = None
    if network.can_capture and config.decode_graphs:
        record = capturer(network.run, pool=pool, vocab_size=vocab_size, device=device)
    runner = ModelRunner(
        network.run,
        pool=pool,
        sampler=sampler,
        device=device,
        advance=network.advance,
        decode=network.decode,
        record=record,
    )
    return Engine(
        scheduler=scheduler,
        runner=runner,
        info=_info(network, config, layout, speculation, started),
        num_ahead=num_ahead,
        snapshots=snapshots,
        grammars=grammars,
        watch=StateWatch(StateNorm(pool.buffer)),
    )


def _info(
    network: Network, config: EngineConfig, layout: StateLayout, speculation: Speculation | None, started: float
) -> EngineInfo:
    pool = network.pool
    return EngineInfo(
        num_slots=pool.num_slots,
        state_bytes_per_slot=pool.spec.bytes_per_slot,
        vocab_size=network.config.vocab_size,
        eos_token_ids=network.config.eos_token_ids,
        device=config.device,
        device_name=device_name(torch.device(config.device)),
        weights_dtype=config.weights_dtype,
        state_dtype=config.state_dtype,
        num_parameters=network.num_parameters,
        load_s=time.monotonic() - started,
        state_layout=layout,
        num_ranks=config.tensor_parallel,
        state_bytes_per_rank=pool.buffer.spec.bytes_per_slot,
        max_drafts=0 if speculation is None else speculation.max_drafts,
        steps=network.steps,
        kernels=network.kernels,
        slow_because=network.slow_because,
        kv_cache_bytes_per_token=_kv_cache_bytes(network.config),
        memory=network.config.memory,
    )


def _begin(sequence: Sequence, snapshots: Snapshots, grammars: GrammarQueue) -> None:
    snapshots.begin(sequence)
    grammars.begin(sequence)


class PoolAccess:
    """Slots of a pool as `server.engine.state.snapshots` takes them: tensors [bytes_per_slot] uint8."""

    def __init__(self, pool: StatePool) -> None:
        self._pool = pool

    @torch.inference_mode()
    def take(self, slot: int) -> object:
        """A copy on the pool's device, in the order of the steps; not waited for."""
        return self._pool.take(slot)

    def to_row(self, snapshot: object) -> Bytes:
        """The bytes on the host."""
        assert isinstance(snapshot, Tensor)
        if self._pool.buffer.storage.is_cuda:
            torch.cuda.synchronize(self._pool.buffer.storage.device)  # a copy to the host may be on its way
        return cast(Bytes, snapshot.cpu().numpy())

    def from_row(self, row: Bytes) -> object:
        """Bytes as a host tensor, in memory from which `StatePool.restore` copies them without anybody waiting."""
        snapshot = torch.from_numpy(row)
        return snapshot.pin_memory() if self._pool.buffer.storage.is_cuda else snapshot


def state_layout(spec: StateSpec, vocab_size: int, fingerprint: str) -> StateLayout:
    """A model's state in plain values."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    offsets = spec.offsets()
    tensors = tuple(
        StateTensorLayout(tensor.name, tensor.shape, names[tensor.dtype], offsets[tensor.name])
        for tensor in spec.tensors
    )
    return StateLayout(fingerprint, vocab_size, spec.bytes_per_slot, tensors)


def _kv_cache_bytes(config: ModelConfig) -> int:
    """Of a token's keys and values in all layers, in 16-bit numbers."""
    return 2 * 2 * len(config.layers) * config.num_kv_heads * config.head_size


def _snapshots(access: PoolAccess, layout: StateLayout, config: EngineConfig) -> Snapshots:
    cache = None
    if config.prefix_cache_host_bytes > 0 or config.prefix_cache_device_bytes > 0:
        cache = PrefixCache(
            snapshot_bytes=layout.bytes_per_slot,
            host_bytes=config.prefix_cache_host_bytes,
            device_bytes=config.prefix_cache_device_bytes,
            to_host=_to_host,
            disk_bytes=config.prefix_cache_disk_bytes,
            disk=None if config.prefix_cache_folder is None else PrefixDisk(access, Path(config.prefix_cache_folder)),
        )
    return Snapshots(
        access,
        layout,
        folder=None if config.states_folder is None else Path(config.states_folder),
        cache=cache,
        policy=CachePolicy(config.prefix_cache_min_tokens, config.prefix_cache_spacing),
    )


def _to_host(snapshot: object) -> object:
    """Not waited for: what is done with the copy on the device comes after it in the same stream."""
    assert isinstance(snapshot, Tensor)
    if not snapshot.is_cuda:
        return snapshot
    on_host = torch.empty(snapshot.shape, dtype=snapshot.dtype, pin_memory=True)
    return on_host.copy_(snapshot, non_blocking=True)
