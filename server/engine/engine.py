"""The synchronous core: requests in, token events out. No thread, no clock but for the statistics.

`step()` plans and launches a step, then takes in the oldest one in flight. With `num_ahead` = 1 the next
step is already on its way to the device when the tokens of this one are read back.
"""

import platform
import time
from collections import deque

import torch

from dijiang_model.checkpoints import load_model
from dijiang_model.model import DiJiangForCausalLM
from server.engine.runner import ModelRunner, Runner
from server.engine.sampler import Sampler
from server.engine.scheduler import Batch, Scheduler
from server.engine.state_pool import StatePool, num_slots_for
from server.engine.types import EngineConfig, EngineInfo, EngineStats, GenerationRequest, TokenEvent

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Engine:
    """A scheduler and a runner that take turns."""

    def __init__(self, *, scheduler: Scheduler, runner: Runner, info: EngineInfo, num_ahead: int = 0) -> None:
        """
        Args:
            scheduler: what runs next.
            runner: what runs it.
            info: what this engine says about itself.
            num_ahead: steps to launch before the oldest one is read back; 0 where the device is the host.
        """
        self.info = info
        self._scheduler = scheduler
        self._runner = runner
        self._num_ahead = num_ahead
        self._in_flight: deque[Batch] = deque()
        self._num_steps = 0
        self._num_prefill_tokens = 0
        self._num_decode_tokens = 0
        self._step_time_s = 0.0

    @classmethod
    def load(cls, config: EngineConfig) -> "Engine":
        """Loads a model and takes the memory for its states.

        Raises:
            dijiang_model.errors.ModelError: the model's files or configuration cannot be served.
            server.engine.state_pool.StateBudgetError: the state memory holds no conversation.
            ValueError: an unknown dtype, or a device that is not there.
        """
        started = time.monotonic()
        if config.weights_dtype not in _DTYPES:
            raise ValueError(f"weights_dtype is {config.weights_dtype!r}, and must be one of {', '.join(_DTYPES)}")
        torch.set_num_threads(config.num_threads)
        _select_device(config.device)
        model = load_model(config.model_path, device=config.device, dtype=_DTYPES[config.weights_dtype])
        return cls.of(model, config, started=started)

    @classmethod
    def of(cls, model: DiJiangForCausalLM, config: EngineConfig, *, started: float | None = None) -> "Engine":
        """Builds an engine around a loaded model; `started` is the clock (monotonic) before it was loaded."""
        started = time.monotonic() if started is None else started
        spec, device = model.state_spec, torch.device(config.device)
        # No more sequences than tokens in a step, or decoding could starve (see the scheduler).
        max_num_slots = min(config.max_num_slots, config.max_step_tokens)
        num_slots = num_slots_for(spec, budget_bytes=config.state_memory_bytes, max_num_slots=max_num_slots)
        vocab_size, eos_token_ids = model.config.vocab_size, model.config.eos_token_ids
        pool = StatePool(spec, num_slots, device)
        sampler = Sampler(vocab_size, eos_token_ids, device)
        scheduler = Scheduler(
            num_slots=num_slots,
            max_step_tokens=config.max_step_tokens,
            max_waiting=config.max_waiting,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
        )
        info = EngineInfo(
            num_slots=num_slots,
            state_bytes_per_slot=pool.bytes_per_slot,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            device=config.device,
            device_name=_device_name(device),
            weights_dtype=config.weights_dtype,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            load_s=time.monotonic() - started,
        )
        runner = ModelRunner(model, pool=pool, sampler=sampler, device=device)
        return cls(scheduler=scheduler, runner=runner, info=info, num_ahead=1 if device.type == "cuda" else 0)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._in_flight) or self._scheduler.has_unfinished

    @property
    def stats(self) -> EngineStats:
        """Gauges of this moment and totals since the start."""
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_free_slots=self._scheduler.num_free_slots,
            num_steps=self._num_steps,
            num_prefill_tokens=self._num_prefill_tokens,
            num_decode_tokens=self._num_decode_tokens,
            step_time_s=self._step_time_s,
        )

    def add(self, request: GenerationRequest) -> TokenEvent | None:
        """Takes a request in; returns its terminal event at once if it is refused.

        Raises:
            ValueError: a request of this id has not ended yet.
        """
        return self._scheduler.add(request)

    def abort(self, request_id: str) -> TokenEvent | None:
        """Ends a request; its terminal event, or None if it is unknown or has ended."""
        event = self._scheduler.abort(request_id)
        self._release_ended()
        return event

    def step(self) -> list[TokenEvent]:
        """One turn. An exception from here leaves the engine unusable."""
        started = time.monotonic()
        batch = self._scheduler.next_batch()
        if batch is not None:
            self._runner.launch(batch)
            self._in_flight.append(batch)
        events: list[TokenEvent] = []
        if self._in_flight and (batch is None or len(self._in_flight) > self._num_ahead):
            events = self._commit(self._in_flight.popleft())
        self._step_time_s += time.monotonic() - started
        return events

    def _commit(self, batch: Batch) -> list[TokenEvent]:
        result = self._runner.collect()
        events = self._scheduler.commit(batch, result.token_ids, result.faults)
        self._release_ended()
        self._num_steps += 1
        self._num_prefill_tokens += batch.num_prefill_tokens
        self._num_decode_tokens += batch.num_decode
        return events

    def _release_ended(self) -> None:
        for sequence in self._scheduler.take_ended():
            self._runner.release(sequence)


def _select_device(name: str) -> None:
    device = torch.device(name)
    if device.type == "cuda":
        num_devices = torch.cuda.device_count()
        if (device.index or 0) >= num_devices:
            raise ValueError(f"device is {name!r}, but {num_devices} CUDA devices are usable here")
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ValueError(f"device is {name!r}, and must be cpu, cuda or cuda:N")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
