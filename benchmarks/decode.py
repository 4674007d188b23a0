"""Decode steps, side by side with HF transformers and llama.cpp on the same base weights.

    dijiang bench decode --cases 1:128,16:2048 --threads 2

Every round takes two steps of each contender in turn and times the second: ours by kind of weights, and the rivals (see
`benchmarks.rivals`): HF's caches are filled with random keys and values up to the context. The largest logit is looked
for in all but llama.cpp's. Ratios are medians over rounds, so that other work on the machine cancels out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from benchmarks import plots, report
from benchmarks.machine import (
    HF,
    LLAMA_CPP,
    RIVALS,
    WEIGHTS,
    Machine,
    best_ms,
    interleaved,
    kind_of_twin,
    median_ms,
    ratio,
)

if TYPE_CHECKING:
    from benchmarks.rivals import Rivals
    from dijiang_model.model import DiJiangForCausalLM

DEFAULT_CASES = "1:128,1:4096,16:2048"
NEAR, FAR = 1_000, 100_000
OWN_LEAD_IN = 1
WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Line:
    """One contender in one case.

    Attributes:
        num_rows, context: conversations in the step, tokens in each so far.
        times_hf: speed over HF's fastest way in the same rounds, with the same kind of weights (beside int8 and int4:
            bf16); None for rivals and without HF.
        times_hf_fp32: the same over HF with fp32 weights.
        times_llama_cpp: over llama.cpp in the same class of weights.
        num_bytes, operations: what the step must do; None for rivals.
        floor_ms: the least time for that at the measured rates.
        times_floor: the best step over it.
        conversation_mib: state, or key-value cache, of one conversation; None where it is not known.
    """

    name: str
    num_rows: int
    context: int
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
    conversation_mib: float | None = None


@dataclass(slots=True)
class Bench:
    """What a run measures with.

    Attributes:
        models: ours, by kind of weights.
    """

    machine: Machine
    models: Mapping[str, DiJiangForCausalLM]
    rivals: Rivals
    clock: str
    num_rounds: int

    def case(self, num_rows: int, context: int) -> list[Line]:
        """All contenders, in turn."""
        from benchmarks.contenders import our_step

        steps = {
            f"ours {kind}": our_step(model, num_rows=num_rows, position=context) for kind, model in self.models.items()
        }
        room = (OWN_LEAD_IN + 1) * (self.num_rounds + WARM_UP) + 1
        theirs = self.rivals.steps(num_rows, context, room=room)
        times = interleaved(
            {**steps, **theirs},
            num_rounds=self.num_rounds,
            warm_up=WARM_UP,
            clock=self.clock,
            num_before=OWN_LEAD_IN,
        )
        times |= self.rivals.token_times(num_rows, context, num_rounds=self.num_rounds)
        return [self._line(name, times, num_rows, context) for name in times]

    def flatness(self) -> dict[str, float]:
        """By kind: time per token at position 100,000 over that at 1,000, rounds taken in turn."""
        from benchmarks.contenders import our_step

        found = {}
        for kind, model in self.models.items():
            steps = {str(at): our_step(model, num_rows=1, position=at) for at in (NEAR, FAR)}
            times = interleaved(steps, num_rounds=4 * self.num_rounds, clock=self.clock)
            found[kind] = ratio(times[str(FAR)], times[str(NEAR)])
        return found

    def _line(self, name: str, times: Mapping[str, list[float]], num_rows: int, context: int) -> Line:
        from benchmarks.costs import step_costs
        from benchmarks.llama_cpp import CLASSES
        from benchmarks.rivals import cache_bytes_per_token

        measured = times[name]
        took = median_ms(measured)
        line = Line(name, num_rows, context, took, best_ms(measured), tokens_per_s=num_rows / took * 1e3)
        if not name.startswith("ours "):
            # These keep halves.
            per_token = cache_bytes_per_token(next(iter(self.models.values())).config)
            share = 0.5 if name.startswith(("llama.cpp", "HF bf16", "HF fp16")) else 1.0
            return replace(line, conversation_mib=share * per_token * context / 2**20)
        kind = name.removeprefix("ours ")
        model = self.models[kind]
        costs = step_costs(model, num_rows=num_rows)
        other = f"llama.cpp {CLASSES.get(kind)}"
        floor = costs.floor_ms(self.machine.multiplying(kind_of_twin(kind)))
        return replace(
            line,
            times_hf=_times_fastest(f"HF {kind_of_twin(kind)} ", times, measured),
            times_hf_fp32=_times_fastest("HF fp32 ", times, measured),
            times_llama_cpp=ratio(times[other], measured) if other in times else None,
            num_bytes=costs.num_bytes,
            operations=costs.operations,
            floor_ms=floor,
            times_floor=line.best_ms / floor,
            conversation_mib=model.state_spec.bytes_per_slot / 2**20,
        )


def _times_fastest(prefix: str, times: Mapping[str, list[float]], measured: list[float]) -> float | None:
    """Speed over the fastest contender whose name begins so."""
    rivals = [rival for rival in times if rival.startswith(prefix)]
    fastest = min(rivals, key=lambda rival: median_ms(times[rival])) if rivals else None
    return None if fastest is None else ratio(times[fastest], measured)


def table(lines: list[Line]) -> Table:
    headings = ("contender", "rows", "context", "ms", "best", "tokens/s", "x HF", "x HF fp32", "x llama.cpp")
    shown = Table(*headings, "MB moved", "GFLOP", "floor ms", "x floor", "MiB each")
    for line in lines:
        shown.add_row(
            line.name,
            str(line.num_rows),
            f"{line.context:,}",
            f"{line.median_ms:.2f}",
            f"{line.best_ms:.2f}",
            f"{line.tokens_per_s:.1f}",
            _shown(line.times_hf),
            _shown(line.times_hf_fp32),
            _shown(line.times_llama_cpp),
            "" if line.num_bytes is None else f"{line.num_bytes / 1e6:.0f}",
            "" if line.operations is None else f"{line.operations / 1e9:.2f}",
            _shown(line.floor_ms),
            _shown(line.times_floor),
            "" if line.conversation_mib is None else f"{line.conversation_mib:.1f}",
        )
    return shown


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def draw(lines: list[Line], path: Path) -> None:
    """Tokens per second by case."""
    cases = list(dict.fromkeys((line.num_rows, line.context) for line in lines))
    found = {(line.name, line.num_rows, line.context): line.tokens_per_s for line in lines}
    names = list(dict.fromkeys(line.name for line in lines))
    plots.bars(
        path,
        title="Decoding",
        unit="tokens/s",
        groups=[f"{rows} x {context:,}" for rows, context in cases],
        series={name: [found.get((name, *case)) for case in cases] for name in names},
    )


def parse_cases(text: str) -> list[tuple[int, int]]:
    """`1:128,16:2048` -> [(1, 128), (16, 2048)]."""
    cases = []
    for part in text.split(","):
        rows, _, context = part.strip().partition(":")
        if not (rows.isdecimal() and context.isdecimal() and int(rows) > 0 and int(context) > 0):
            raise typer.BadParameter(f"{part!r} is not ROWS:CONTEXT, such as 1:128", param_hint="--cases")
        cases.append((int(rows), int(context)))
    return cases


def decode_command(
    model: report.ModelFolder = None,
    cases: Annotated[
        str, typer.Option(help="ROWS:CONTEXT with commas: conversations, tokens of each.")
    ] = DEFAULT_CASES,
    weights: Annotated[
        str | None, typer.Option(help=f"Kinds of ours: {', '.join(WEIGHTS)}. Default: fp32,int8; bf16 on CUDA.")
    ] = None,
    rivals: Annotated[str, typer.Option(help=f"Of {', '.join(RIVALS)}, with commas; or nothing.")] = HF,
    gguf: Annotated[Path | None, typer.Option(help="llama.cpp's file; the default model's if absent.")] = None,
    most_read: Annotated[int, typer.Option(min=1, help="Longest context that llama.cpp is made to read.")] = 8192,
    rival_limit_s: Annotated[float, typer.Option(min=1, help="For compiling, and for continuous batching.")] = 120,
    device: report.Device = "cpu",
    threads: report.Threads = None,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each contender in each case.")] = 7,
    clock: report.Clock = "wall",
    flat: Annotated[bool, typer.Option(help="Compare position 100,000 with 1,000 as well.")] = False,
    only_json: report.OnlyJson = False,
    plot: report.Plot = None,
    save: report.Save = None,
) -> None:
    """Time decode steps beside HF transformers and llama.cpp, and against the memory they must move."""
    told = report.Report("decode", only_json, plot, save)
    report.prepare(threads, clock, device)
    parsed = parse_cases(cases)
    kinds = report.kinds_of_weights(weights, device)
    wanted = report.words(rivals, "--rivals", RIVALS)
    folder = report.model_folder(model)
    machine = report.measured_machine(clock, device, list(map(kind_of_twin, kinds)))
    told.introduce(machine)
    # Imported late: `--help` and mistakes in options need nothing of torch.
    from benchmarks.rivals import Rivals, Where, cache_bytes_per_token, files_for, twins_at

    with ExitStack() as stack:
        models = report.loaded_models(folder, kinds, device)
        twins = twins_at(folder, models, told.note) if set(wanted) - {LLAMA_CPP} else {}
        where = Where(device, machine.num_threads, told.note, stack)
        files = files_for(model, gguf, kinds, where) if LLAMA_CPP in wanted else {}
        others = Rivals(
            names=tuple(wanted),
            twins=twins,
            files=files,
            cache_bytes=cache_bytes_per_token(next(iter(models.values())).config),
            device=device,
            num_threads=machine.num_threads,
            limit_s=rival_limit_s,
            max_read_tokens=most_read,
            note=told.note,
        )
        bench = Bench(machine, models, others, clock, rounds)
        lines = [line for case in parsed for line in bench.case(*case)]
        flatness = bench.flatness() if flat else None
    result: dict[str, Any] = {"model": folder.name, "device": device, "cpus": os.cpu_count(), **_way(models)}
    result |= {"clock": clock, "lines": [asdict(line) for line in lines], "position_100000_over_1000": flatness}
    if flatness is not None:
        for kind, value in flatness.items():
            told.note(f"ours {kind}: a token at position {FAR:,} takes {value:.3f} times one at {NEAR:,}")
    told.finish(machine, result, table(lines), lambda file: draw(lines, file))


def _way(models: Mapping[str, DiJiangForCausalLM]) -> dict[str, str]:
    """How the first of them decodes."""
    from dijiang_model.serving.network import freeze

    frozen = freeze(next(iter(models.values())))
    return {"decode_path": frozen.decode_path, "kernels": frozen.kernels}


if __name__ == "__main__":
    typer.run(decode_command)
