"""Prompts, side by side with HF transformers and llama.cpp on the same base weights.

    dijiang bench prefill --lengths 512,2048 --ragged 64,200,512,1000 --threads 2

Every round feeds the same prompts to each contender in turn: ours by kind of weights, each into a fresh state; HF with
sdpa and a new dynamic cache, prompts of different lengths padded on the left; llama.cpp in batches of 512 tokens, one
prompt after the other. All answer the logits of the last token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from benchmarks import plots, report
from benchmarks.machine import HF, LLAMA_CPP, WEIGHTS, Machine, best_ms, interleaved, kind_of_twin, median_ms, ratio

if TYPE_CHECKING:
    from benchmarks.costs import Costs
    from dijiang_model.model import DiJiangForCausalLM

RIVALS = (HF, LLAMA_CPP)
DEFAULT_LENGTHS = "128,512,2048"
DEFAULT_RAGGED = "48,130,300,700"
LONG_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Line:
    """One contender and one batch of prompts.

    Attributes:
        lengths: tokens of each prompt.
        times_hf: speed over HF in the same rounds, with the same kind of weights (beside int8 and int4: bf16); None for
            HF itself.
        times_hf_fp32: the same over HF with fp32 weights.
        times_llama_cpp: the same over llama.cpp with weights of the same class (beside int8: Q8_0).
        num_bytes, operations: what must be done at least; None for HF.
        floor_ms: the least time for that at the measured rates.
        times_floor: the best run over it.
    """

    name: str
    lengths: list[int]
    median_ms: float
    best_ms: float
    tokens_per_s: float
    times_hf: float | None = None
    times_hf_fp32: float | None = None
    times_llama_cpp: float | None = None
    num_bytes: int | None = None
    operations: int | None = None
    floor_ms: float | None = None
    times_floor: float | None = None


def prompt_costs(model: DiJiangForCausalLM, lengths: list[int]) -> Costs:
    """Of reading prompts together: weights once, the last token's logits of each."""
    from benchmarks.costs import Costs, step_costs, weight_bytes

    each = [step_costs(model, num_rows=1, num_tokens=length) for length in lengths]
    shared = (len(lengths) - 1) * weight_bytes(model)
    return Costs(sum(costs.num_bytes for costs in each) - shared, sum(costs.operations for costs in each))


def run_case(
    models: Mapping[str, DiJiangForCausalLM],
    twins: Mapping[str, Any],
    files: Mapping[str, Path],
    lengths: list[int],
    *,
    machine: Machine,
    device: str,
    num_rounds: int,
    clock: str,
) -> list[Line]:
    """All contenders, in turn."""
    from benchmarks.contenders import our_prefill, their_prefill
    from benchmarks.llama_cpp import CLASSES, Prompts

    runs: dict[str, Callable[[], object]]
    runs = {f"ours {kind}": our_prefill(model, lengths=lengths) for kind, model in models.items()}
    runs |= {_hf(kind): their_prefill(twin, lengths=lengths, device=device) for kind, twin in twins.items()}
    for kind, file in files.items():
        runs[_llama_cpp(kind)] = Prompts(file, lengths=lengths, num_threads=machine.num_threads)
    # A long prompt takes many seconds, next to which a cold start is nothing.
    times = interleaved(runs, num_rounds=num_rounds, warm_up=1 if sum(lengths) < LONG_TOKENS else 0, clock=clock)
    lines = []
    for name, measured in times.items():
        took = median_ms(measured)
        line = Line(name, lengths, took, best_ms(measured), tokens_per_s=sum(lengths) / took * 1e3)
        if name.startswith("ours "):
            kind = name.removeprefix("ours ")
            costs = prompt_costs(models[kind], lengths)
            floor = costs.floor_ms(machine.multiplying(kind_of_twin(kind)))
            same, plain = times.get(_hf(kind_of_twin(kind))), times.get(_hf("fp32"))
            of_class = times.get(_llama_cpp(CLASSES.get(kind, "")))
            line = replace(
                line,
                times_hf=None if same is None else ratio(same, measured),
                times_hf_fp32=None if plain is None else ratio(plain, measured),
                times_llama_cpp=None if of_class is None else ratio(of_class, measured),
                num_bytes=costs.num_bytes,
                operations=costs.operations,
                floor_ms=floor,
                times_floor=line.best_ms / floor,
            )
        lines.append(line)
    return lines


def _hf(kind: str) -> str:
    return f"HF {kind} sdpa"


def _llama_cpp(kind: str) -> str:
    return f"llama.cpp {kind}"


def label(lengths: list[int]) -> str:
    """`2,048`, or `48+130+300` for a batch."""
    return "+".join(f"{length:,}" for length in lengths)


def table(lines: list[Line]) -> Table:
    shown = Table("contender", "tokens", "ms", "best", "tokens/s", "x HF", "x HF fp32", "x llama.cpp")
    for heading in ("MB moved", "GFLOP", "floor ms", "x floor"):
        shown.add_column(heading)
    for line in lines:
        shown.add_row(
            line.name,
            label(line.lengths),
            f"{line.median_ms:.0f}",
            f"{line.best_ms:.0f}",
            f"{line.tokens_per_s:.0f}",
            "" if line.times_hf is None else f"{line.times_hf:.2f}",
            "" if line.times_hf_fp32 is None else f"{line.times_hf_fp32:.2f}",
            "" if line.times_llama_cpp is None else f"{line.times_llama_cpp:.2f}",
            "" if line.num_bytes is None else f"{line.num_bytes / 1e6:.0f}",
            "" if line.operations is None else f"{line.operations / 1e9:.1f}",
            "" if line.floor_ms is None else f"{line.floor_ms:.0f}",
            "" if line.times_floor is None else f"{line.times_floor:.2f}",
        )
    return shown


def draw(lines: list[Line], path: Path) -> None:
    """Tokens per second by batch."""
    cases = list(dict.fromkeys(label(line.lengths) for line in lines))
    found = {(line.name, label(line.lengths)): line.tokens_per_s for line in lines}
    names = list(dict.fromkeys(line.name for line in lines))
    plots.bars(
        path,
        title="Reading prompts",
        unit="tokens/s",
        groups=cases,
        series={name: [found.get((name, case)) for case in cases] for name in names},
    )


def prefill_command(
    model: report.ModelFolder = None,
    lengths: Annotated[str, typer.Option(help="Prompts read alone: tokens, with commas.")] = DEFAULT_LENGTHS,
    ragged: Annotated[
        str, typer.Option(help="Prompts read together: tokens, with commas; or nothing.")
    ] = DEFAULT_RAGGED,
    weights: Annotated[
        str | None, typer.Option(help=f"Kinds of ours: {', '.join(WEIGHTS)}. Default: fp32,int8; bf16 on CUDA.")
    ] = None,
    rivals: Annotated[str, typer.Option(help=f"Of {', '.join(RIVALS)}, with commas; or nothing.")] = HF,
    gguf: Annotated[Path | None, typer.Option(help="llama.cpp's file; the default model's if absent.")] = None,
    device: report.Device = "cpu",
    threads: report.Threads = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each contender in each case.")] = 3,
    clock: report.Clock = "wall",
    only_json: report.OnlyJson = False,
    plot: report.Plot = None,
    save: report.Save = None,
) -> None:
    """Time the reading of prompts beside HF transformers and llama.cpp, and against the products that it takes."""
    told = report.Report("prefill", only_json, plot, save)
    report.prepare(threads, clock, device)
    cases = [[length] for length in report.numbers(lengths, "--lengths")]
    if ragged.strip():
        cases.append(report.numbers(ragged, "--ragged"))
    kinds = report.kinds_of_weights(weights, device)
    wanted = report.words(rivals, "--rivals", RIVALS)
    folder = report.model_folder(model)
    machine = report.measured_machine(clock, device, list(map(kind_of_twin, kinds)))
    told.introduce(machine)
    # Imported late: `--help` and mistakes in options need nothing of torch.
    from benchmarks.rivals import Where, files_for, twins_at
    from dijiang_model.serving.network import freeze

    models = report.loaded_models(folder, kinds, device)
    frozen = freeze(next(iter(models.values())))
    found: list[Line] = []
    with ExitStack() as stack:
        twins = twins_at(folder, models, told.note) if HF in wanted else {}
        where = Where(device, machine.num_threads, told.note, stack)
        files = files_for(model, gguf, kinds, where) if LLAMA_CPP in wanted else {}
        for case in cases:
            found += run_case(
                *(models, twins, files, case), machine=machine, device=device, num_rounds=rounds, clock=clock
            )
    result = {
        "model": folder.name,
        "device": device,
        "path": frozen.decode_path,
        "kernels": frozen.kernels,
        "clock": clock,
        "lines": [asdict(line) for line in found],
    }
    told.finish(machine, result, table(found), lambda file: draw(found, file))


if __name__ == "__main__":
    typer.run(prefill_command)
