"""What the benchmarks share: the machine's name and memory bandwidth, interleaved timing, where results go."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
BANDWIDTH_BYTES = 2**29


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu` counts this process alone: for one thread on a machine that others use too."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where numbers come from.

    Attributes:
        processor: its own name for itself.
        num_threads: of tensor operations.
        read_gb_s: measured rate of reading memory that is not in a cache, all threads together.
        load_average: runnable processes over the last minute when the benchmark started; above 1 or so the
            machine was not ours alone, and only ratios of interleaved runs mean something.
    """

    processor: str
    num_threads: int
    read_gb_s: float
    load_average: float


def this_machine(clock: str = "wall") -> Machine:
    """Names the processor and measures its memory, by one of `CLOCKS`."""
    return Machine(_processor(), torch.get_num_threads(), read_bandwidth_gb_s(clock), _load_average())


def read_bandwidth_gb_s(clock: str, *, num_runs: int = 15) -> float:
    """Best of some passes over half a gigabyte: a dot product, which reads and hardly computes."""
    half = BANDWIDTH_BYTES // 8
    a, b = torch.ones(half), torch.ones(half)
    times = []
    for _ in range(num_runs):
        start = CLOCKS[clock]()
        torch.dot(a, b)
        times.append(CLOCKS[clock]() - start)
    return BANDWIDTH_BYTES / min(times) / 1e9


@torch.inference_mode()
def interleaved(
    runs: Mapping[str, Callable[[], object]], *, num_rounds: int, warm_up: int = 2, clock: str = "wall"
) -> dict[str, list[float]]:
    """Times each of `runs` once in every round, so that a busy neighbour disturbs all of them alike.

    Returns:
        Seconds of each round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    read = CLOCKS[clock]
    for round_ in range(warm_up + num_rounds):
        for name, run in runs.items():
            start = read()
            run()
            elapsed = read() - start
            if round_ >= warm_up:
                times[name].append(elapsed)
    return times


def median_ms(times: list[float]) -> float:
    return statistics.median(times) * 1e3


def best_ms(times: list[float]) -> float:
    return min(times) * 1e3


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of how many times longer one took than the other in the same round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def write_result(benchmark: str, machine: Machine, result: Mapping[str, object]) -> str:
    """Stores a result under `benchmarks/results/` by device and date, and answers its one JSON line."""
    date = datetime.now(UTC).date().isoformat()
    document = {"benchmark": benchmark, "date": date, "machine": asdict(machine), **result}
    name = machine.processor.lower().replace(" ", "-")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}-{name}-{machine.num_threads}t-{date}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return json.dumps(document)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _load_average() -> float:

    return os.getloadavg()[0]
