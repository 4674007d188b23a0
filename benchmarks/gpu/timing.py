"""Times on a GPU, by its own clock; and its two ceilings, measured. On a CPU the same calls take the wall clock."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

COPY_BYTES = {"cuda": 1 << 32, "cpu": 1 << 24}
MATRIX = {"cuda": 8192, "cpu": 256}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device can do at most.

    Attributes:
        name: the device's.
        copy_gb_s: bytes read and written of a large copy, 10^9 a second.
        matrix_tflop_s: of a large product in the weights' dtype on random numbers, 10^12 a second.
    """

    name: str
    copy_gb_s: float
    matrix_tflop_s: float

    def floor_ms(self, *, num_bytes: float, operations: float) -> float:
        """The longer of moving the bytes and doing the operations."""
        return max(num_bytes / self.copy_gb_s / 1e6, operations / self.matrix_tflop_s / 1e9)


def ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Measures both, a few hundred milliseconds."""
    kind = torch.device(device).type
    copy_gb_s = _copy_gb_s(device, COPY_BYTES[kind])
    size = MATRIX[kind]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product_ms = median_ms(lambda: a @ b, device=device, num_rounds=20)
    name = torch.cuda.get_device_name(device) if kind == "cuda" else "cpu"
    return Ceilings(name, copy_gb_s, 2 * size**3 / product_ms / 1e9)


def _copy_gb_s(device: str, num_bytes: int) -> float:
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / median_ms(lambda: target.copy_(source), device=device, num_rounds=20) / 1e6


@torch.inference_mode()
def interleaved_ms(
    runs: Mapping[str, Callable[[], object]], *, device: str, num_rounds: int, warm_up: int = 3
) -> dict[str, float]:
    """Median milliseconds of each, run in turn; on CUDA between events in the stream, launch gaps included."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warm_up + num_rounds):
        for name, run in runs.items():
            took = _once_ms(run, device)
            if number >= warm_up:
                times[name].append(took)
    return {name: statistics.median(one) for name, one in times.items()}


def median_ms(run: Callable[[], object], *, device: str, num_rounds: int) -> float:
    """Of one alone."""
    return interleaved_ms({"it": run}, device=device, num_rounds=num_rounds)["it"]


@torch.inference_mode()
def host_ms(run: Callable[[], object], *, device: str, num_rounds: int) -> float:
    """Median time until the host is free again, the device idle before each run."""
    times = []
    for _ in range(num_rounds):
        _wait(device)
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    _wait(device)
    return statistics.median(times)


def _once_ms(run: Callable[[], object], device: str) -> float:
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
