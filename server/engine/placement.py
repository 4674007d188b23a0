"""Where an engine computes and in what numbers: the configured device and dtype as torch knows them."""

import platform
from collections.abc import Mapping

import torch

from dijiang_model.quantization.config import WeightKind
from server.engine.types.requests import EngineConfig

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
QUANTIZED: Mapping[str, WeightKind] = {"int8": "int8", "int4": "int4"}
"""Of a model's weights; the rest of it computes in float32 on a CPU and in bfloat16 on CUDA."""
STATE_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
"""Names of `DiJiangForCausalLM.keep_states_in`."""


def weights_dtype(config: EngineConfig) -> torch.dtype:
    """The dtype of the weights that are not quantized.

    Raises:
        ValueError: an unknown one.
    """
    if config.weights_dtype in QUANTIZED:
        return torch.bfloat16 if torch.device(config.device).type == "cuda" else torch.float32
    if config.weights_dtype not in DTYPES:
        known = ", ".join((*DTYPES, *QUANTIZED))
        raise ValueError(f"weights_dtype is {config.weights_dtype!r}, and must be one of {known}")
    return DTYPES[config.weights_dtype]


def weights_kind(config: EngineConfig) -> WeightKind | None:
    """What weights are rounded to, if they are not stored so already; None: they stay as they are."""
    return QUANTIZED.get(config.weights_dtype)


def state_dtype(config: EngineConfig) -> torch.dtype:
    """What states are kept in.

    Raises:
        ValueError: an unknown one.
    """
    if config.state_dtype not in STATE_DTYPES:
        raise ValueError(f"state_dtype is {config.state_dtype!r}, and must be one of {', '.join(STATE_DTYPES)}")
    return STATE_DTYPES[config.state_dtype]


def numbers_of(config: EngineConfig) -> str:
    """What a state depends on beside the model: the same text means the same rounding."""
    if config.state_dtype == "float32":
        return config.weights_dtype
    return f"{config.weights_dtype}, states {config.state_dtype}"


def select_device(name: str) -> torch.device:
    """Checks that a device is there, and makes it this process's current one.

    Raises:
        ValueError: it is not there, or of an unknown kind.
    """
    device = require_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def require_device(name: str) -> torch.device:
    """Checks that a device is there, without touching it.

    Raises:
        ValueError: it is not there, or of an unknown kind.
    """
    device = torch.device(name)
    if device.type == "cuda":
        num_devices = torch.cuda.device_count()
        if (device.index or 0) >= num_devices:
            raise ValueError(f"device is {name!r}, but {num_devices} CUDA devices are usable here")
    elif device.type != "cpu":
        raise ValueError(f"device is {name!r}, and must be cpu, cuda or cuda:N")
    return device


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def device_of(config: EngineConfig, rank: int) -> str:
    """The device of a rank: the configured one for rank 0, the CUDA devices that follow it for the others."""
    kind, _, number = config.device.partition(":")
    return kind if kind == "cpu" else f"{kind}:{int(number or 0) + rank}"


def num_threads_of(config: EngineConfig) -> int:
    """Tensor threads of each rank: they share the configured ones."""
    return max(1, config.num_threads // config.tensor_parallel)
