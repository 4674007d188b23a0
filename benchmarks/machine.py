"""What the benchmarks share: the device's name and its rates, interleaved timing, where results go."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
BANDWIDTH_BYTES = 2**29
MATRIX = {"cpu": 1024, "cuda": 8192}
"""Rows of the square matrices whose product gives the matrix rate."""
PLAIN = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Kinds of weights that are not quantized, as torch calls them."""
WEIGHTS = (*PLAIN, "int8", "int4")
RIVALS = HF, COMPILED, CONTINUOUS, LLAMA_CPP = "hf", "hf-compiled", "hf-continuous", "llama.cpp"
"""What ours is timed beside (`benchmarks.rivals`)."""
UNITS = frozenset({"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"})
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu` counts this process alone: for one thread on a machine that others use too."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where numbers come from.

    Attributes:
        processor: its own name for itself.
        num_threads: of tensor operations on the CPU.
        read_gb_s: measured rate of reading memory that is not in a cache, all threads together.
        load_average: runnable processes over the last minute when the benchmark started; above 1 or so the
            machine was not ours alone, and only ratios of interleaved runs mean something.
        matrix_gflop_s: measured rate of a large matrix product in the first kind of weights, 10^9 operations a second.
        matrix_rates: the same in each kind of `PLAIN` that is compared.
        units: what the processor has for products, as its flags name it; empty elsewhere than on Linux.
    """

    processor: str
    num_threads: int
    read_gb_s: float
    load_average: float
    matrix_gflop_s: float
    matrix_rates: Mapping[str, float] = field(default_factory=dict)
    units: str = ""

    def multiplying(self, kind: str) -> "Machine":
        """The same with the rate of one of its kinds; with the first one's if that was not measured."""
        return replace(self, matrix_gflop_s=self.matrix_rates.get(kind, self.matrix_gflop_s))


def this_machine(clock: str = "wall", *, device: str = "cpu", kinds: Sequence[str] = ("fp32",)) -> Machine:
    """Names the device and measures it, by one of `CLOCKS`; `kinds` of weights, one at least."""
    import torch

    rates = {kind: matrix_gflop_s(clock, device=device, kind=kind) for kind in dict.fromkeys(kinds)}
    return Machine(
        processor=torch.cuda.get_device_name(device) if is_cuda(device) else _processor(),
        num_threads=torch.get_num_threads(),
        read_gb_s=read_bandwidth_gb_s(clock, device=device),
        load_average=os.getloadavg()[0],
        matrix_gflop_s=next(iter(rates.values())),
        matrix_rates=rates,
        units="" if is_cuda(device) else " ".join(sorted(UNITS & _cpu_flags())),
    )


def read_bandwidth_gb_s(clock: str = "wall", *, device: str = "cpu", num_runs: int = 15) -> float:
    """Best of some passes over half a gigabyte: a dot product, which reads and hardly computes."""
    import torch

    half = BANDWIDTH_BYTES // 8
    a, b = torch.ones(half, device=device), torch.ones(half, device=device)
    run = synchronised(lambda: torch.dot(a, b), device)
    return BANDWIDTH_BYTES / min(interleaved({"dot": run}, num_rounds=num_runs, clock=clock)["dot"]) / 1e9


def matrix_gflop_s(clock: str = "wall", *, device: str = "cpu", kind: str = "fp32", num_runs: int = 9) -> float:
    """Best rate of a square matrix product."""
    import torch

    size = MATRIX["cuda" if is_cuda(device) else "cpu"]
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, PLAIN[kind])) for _ in range(2))
    run = synchronised(lambda: a @ b, device)
    return 2 * size**3 / min(interleaved({"product": run}, num_rounds=num_runs, clock=clock)["product"]) / 1e9


def is_cuda(device: str) -> bool:
    """Whether a device name is a CUDA device's."""
    return device.startswith("cuda")


def kind_of_twin(kind: str) -> str:
    """Which of HF's kinds of weights is to be beaten by one of ours: its own; by quantized weights HF's 16 bits."""
    return kind if kind in PLAIN else "bf16"


def synchronised(run: Callable[[], object], device: str) -> Callable[[], object]:
    """The same, over only when the device has done it."""
    if not is_cuda(device):
        return run
    import torch

    def wait() -> object:
        result = run()
        torch.cuda.synchronize(device)
        return result

    return wait


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    num_rounds: int,
    warm_up: int = 2,
    clock: str = "wall",
    num_before: int = 0,
) -> dict[str, list[float]]:
    """Times each of `runs` once in every round, so that a busy neighbour disturbs all of them alike.

    Args:
        num_before: runs of the same, not timed, before each one that is: threads of the one before it may go on
            waiting for work for some milliseconds, on a core that this one needs.

    Returns:
        Seconds of each round, by name.
    """
    import torch

    times: dict[str, list[float]] = {name: [] for name in runs}
    read = CLOCKS[clock]
    with torch.inference_mode():
        for round_ in range(warm_up + num_rounds):
            for name, run in runs.items():
                for _ in range(num_before):
                    run()
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


def document(benchmark: str, machine: Machine, result: Mapping[str, object]) -> dict[str, object]:
    """A result with its date and where it comes from."""
    date = datetime.now(UTC).date().isoformat()
    return {"benchmark": benchmark, "date": date, "machine": asdict(machine), **result}


def save_document(found: Mapping[str, object], folder: Path, machine: Machine) -> Path:
    """Stores a result in a folder, by benchmark, device and date; answers the file."""
    name = machine.processor.lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{found['benchmark']}-{name}-{machine.num_threads}t-{found['date']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def write_result(benchmark: str, machine: Machine, result: Mapping[str, object]) -> str:
    """Stores a result under `benchmarks/results/`, and answers its one JSON line."""
    found = document(benchmark, machine, result)
    save_document(found, RESULTS, machine)
    return json.dumps(found)


def _processor() -> str:
    return _cpu_line("model name") or platform.machine()


def _cpu_flags() -> set[str]:
    return set(_cpu_line("flags").split())


def _cpu_line(name: str) -> str:
    """What Linux says of the first core; empty: nothing."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
