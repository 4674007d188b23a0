"""What the machine offers: device, cores, free memory. Imports no torch, so that the service stays small.

CUDA is asked about in a short-lived process: a context in this one would hold device memory for ever.
"""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

CUDA_DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg")
CUDA_QUESTION = (
    "import json, torch; print(json.dumps([torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]))"
)
QUESTION_TIMEOUT_S = 120
TINY_MACHINE_CORES, SMALL_MACHINE_CORES = 2, 8
UNLIMITED_CORES = 1 << 20
CPU_SHARE, CUDA_SHARE = 0.5, 0.9
WORKSPACE_BYTES = 1 << 30
CONTROL_GROUPS = Path("/sys/fs/cgroup")
CONTROL_GROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
DESCRIPTORS_KEPT = 256
"""For files, the engine, the store and what is being accepted."""
WEIGHT_FILES = ("*.safetensors", "*.bin")


class HardwareError(ValueError):
    """The machine lacks what was asked for."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device and the memory that was free on it, in bytes."""

    name: str
    free_bytes: int

    @property
    def is_cuda(self) -> bool:
        return self.name.startswith("cuda")


def find_device(wanted: str, *, num_ranks: int = 1) -> Device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`.

    Args:
        wanted: one of those.
        num_ranks: devices that are needed from this one on, if it is CUDA; the memory is then that of the fullest.

    Raises:
        HardwareError: CUDA devices are asked for that are not there.
    """
    free = [] if wanted == "cpu" else free_cuda_bytes()
    if wanted == "cpu" or (wanted == "auto" and not free):
        return Device("cpu", free_host_bytes())
    number = int(wanted.partition(":")[2] or 0)
    if number >= len(free):
        raise HardwareError(f"device is {wanted}, but there are {len(free)} CUDA devices that torch can use here")
    if number + num_ranks > len(free):
        raise HardwareError(
            f"tensor_parallel is {num_ranks} and needs {num_ranks} CUDA devices from cuda:{number} on, but there are "
            f"{len(free)} that torch can use here; --device cpu runs all of it on the CPU"
        )
    return Device(f"cuda:{number}", min(free[number : number + num_ranks]))


def free_cuda_bytes() -> list[int]:
    """Free memory of each CUDA device that torch can use; empty without any."""
    if not any(Path(path).exists() for path in CUDA_DEVICE_FILES):
        return []
    command = [sys.executable, "-c", CUDA_QUESTION]
    try:
        answer = subprocess.run(  # noqa: S603 (a fixed command)
            command, capture_output=True, check=True, timeout=QUESTION_TIMEOUT_S
        )
        return [int(free) for free in json.loads(answer.stdout)]
    except (subprocess.SubprocessError, ValueError):
        return []


def free_host_bytes(control_groups: Path = CONTROL_GROUPS) -> int:
    """Memory that can be taken without swapping, within the limit of a container (control groups 1 and 2)."""
    available = psutil.virtual_memory().available
    for limit_name, used_name in CONTROL_GROUP_FILES:
        try:
            limit = int((control_groups / limit_name).read_text())
            used = int((control_groups / used_name).read_text())
        except (OSError, ValueError):  # another version, or no limit ("max")
            continue
        available = min(available, max(0, limit - used))
    return available


def default_threads(control_groups: Path = CONTROL_GROUPS) -> int:
    """All cores but one on small machines, half of them (one for each pair of hyperthreads) on large ones.

    Of two cores both: the service takes little of either, and one alone computes at half the rate. A container that may
    use the time of fewer cores than it sees is as large as that: more threads would take turns.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = min(1 if cores is None else cores, allowed_cores(control_groups))
    if cores <= TINY_MACHINE_CORES:
        return cores
    return cores - 1 if cores <= SMALL_MACHINE_CORES else cores // 2


def allowed_cores(control_groups: Path = CONTROL_GROUPS) -> int:
    """Cores whose time a container may use in all, rounded down, at least 1; very many without a limit."""
    try:
        quota, period = (control_groups / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (control_groups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        except OSError:
            return UNLIMITED_CORES
    try:
        return max(1, int(quota) // int(period)) if int(quota) > 0 else UNLIMITED_CORES
    except ValueError:  # "max": no limit
        return UNLIMITED_CORES


def default_state_bytes(device: Device, model: Path, *, num_ranks: int = 1) -> int:
    """A share of the free memory after the weights: half of it on a CPU, nearly all on CUDA.

    Args:
        device: of the first rank.
        model: its folder.
        num_ranks: over which weights and states are split: on CUDA with as many devices of as much memory.

    Raises:
        HardwareError: the weights alone do not fit.
    """
    weights = sum(path.stat().st_size for pattern in WEIGHT_FILES for path in model.glob(pattern))
    # Weights stored in half precision double in float32 on a CPU.
    reserved = weights + num_ranks * WORKSPACE_BYTES if device.is_cuda else 2 * weights
    share = CUDA_SHARE if device.is_cuda else CPU_SHARE
    free = device.free_bytes * num_ranks if device.is_cuda else device.free_bytes
    budget = int((free - reserved) * share)
    if budget <= 0:
        place = f"{num_ranks} devices from {device.name} on" if device.is_cuda and num_ranks > 1 else device.name
        raise HardwareError(
            f"{free / 2**30:.1f} GiB are free on {place}, too little for the "
            f"{weights / 2**30:.1f} GiB of weights and states beside them; set state_memory to try it all the same"
        )
    return budget


def raised_descriptor_limit() -> int:
    """Raises this process's limit of open files as far as it may; returns it, 0 where there is none."""
    try:
        import resource
    except ImportError:  # not made for Windows
        return 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # more than the system's own limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return 0 if soft == resource.RLIM_INFINITY else soft


def max_connections(descriptor_limit: int) -> int:
    """How many connections leave descriptors for everything else; 0: any number."""
    return 0 if descriptor_limit == 0 else max(1, descriptor_limit - min(DESCRIPTORS_KEPT, descriptor_limit // 2))
