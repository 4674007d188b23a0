"""From a configuration to a running engine: the model, the memory for its states, and what goes with them."""

import platform
import time

import torch

from dijiang_model.checkpoints import load_model
from dijiang_model.model import DiJiangForCausalLM
from server.engine.engine import Engine
from server.engine.runner import ModelRunner
from server.engine.sampler import Sampler
from server.engine.scheduler import Scheduler
from server.engine.state_pool import StatePool, num_slots_for
from server.engine.types import EngineConfig, EngineInfo

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_engine(config: EngineConfig) -> Engine:
    """Loads a model and takes the memory for its states. Sets this process's number of tensor threads.

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
    return build_engine(model, config, started=started)


def build_engine(model: DiJiangForCausalLM, config: EngineConfig, *, started: float | None = None) -> Engine:
    """An engine around a model that is on the configured device already.

    Args:
        model: ready to compute.
        config: its device, memory and limits count here.
        started: `time.monotonic()` before the model was loaded, for `EngineInfo.load_s`.

    Raises:
        server.engine.state_pool.StateBudgetError: the state memory holds no conversation.
    """
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
    return Engine(scheduler=scheduler, runner=runner, info=info, num_ahead=1 if device.type == "cuda" else 0)


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
