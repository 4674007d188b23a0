"""Prompts on a CPU, side by side with HF transformers on the same base weights.

    python benchmarks/prefill.py --threads 2

Every round feeds one prompt to each contender in turn: ours with fp32 and int8 weights, and HF with sdpa and a
dynamic cache; each answers the logits of the last token. The mixing weights are 1, as in a trained model.
`floor` is the projections' multiplications at the measured rate of a large fp32 matrix product. The last
line is JSON.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.decode import DEFAULT_MODEL, awake
from benchmarks.machine import CLOCKS, interleaved, median_ms, ratio, this_machine, write_result
from benchmarks.transformers_twin import transformers_twin
from dijiang_model.checkpoints import load_model
from dijiang_model.model import DiJiangForCausalLM, PackedBatch
from dijiang_model.state import StateBuffer

HF = "HF sdpa"
DEFAULT_LENGTHS = "128,512,2048,8192"
MATRIX = 1024


@dataclass(frozen=True, slots=True)
class Line:
    """One contender and one prompt length; `speed_up` over HF in the same rounds, None for HF itself."""

    name: str
    num_tokens: int
    median_ms: float
    tokens_per_s: float
    speed_up: float | None
    floor_ms: float


def our_prefill(model: DiJiangForCausalLM, *, num_tokens: int) -> Callable[[], torch.Tensor]:
    """A prompt into a fresh slot."""
    state = StateBuffer(model.state_spec, 2)
    positions = torch.arange(num_tokens)
    last = torch.tensor([num_tokens - 1])
    batch = PackedBatch(positions % 1000 + 5, positions, torch.tensor([1]), (num_tokens,), 0, last)

    def prefill() -> torch.Tensor:
        state.storage[1].zero_()
        logits: torch.Tensor = model(batch, state)
        return logits

    return prefill


def their_prefill(twin: Any, *, num_tokens: int) -> Callable[[], torch.Tensor]:
    """The same prompt through HF's model, into a new cache."""
    token_ids = (torch.arange(num_tokens) % 1000 + 5)[None]

    def prefill() -> torch.Tensor:
        logits: torch.Tensor = twin(token_ids, use_cache=True, logits_to_keep=1).logits
        return logits

    return prefill


def matrix_gflop_s(clock: str, *, num_runs: int = 9) -> float:
    """Best rate of a square fp32 matrix product."""
    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    times = interleaved({"product": lambda: a @ b}, num_rounds=num_runs, clock=clock)["product"]
    return 2 * MATRIX**3 / min(times) / 1e9


def multiplications(model: DiJiangForCausalLM) -> int:
    """Weights of the projections, each of which takes part once a token."""
    return sum(parameter.numel() for block in model.blocks for parameter in block.parameters())


def main(
    model: Annotated[Path, typer.Option(help="Folder of a LLaMA-family model.")] = DEFAULT_MODEL,
    threads: Annotated[int, typer.Option(help="Threads of both sides.")] = 1,
    rounds: Annotated[int, typer.Option(help="Prompts of each contender and length.")] = 3,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, with commas.")] = DEFAULT_LENGTHS,
    clock: Annotated[str, typer.Option(help="wall, or cpu: this process alone (one thread, busy machine).")] = "wall",
) -> None:
    """Measures prefill and writes it to benchmarks/results/."""
    if clock not in CLOCKS or (clock == "cpu" and threads != 1):
        raise typer.BadParameter("--clock is wall or cpu, and cpu needs --threads 1")
    console = Console(width=100)
    torch.set_num_threads(threads)
    machine, gflop_s = this_machine(clock), matrix_gflop_s(clock)
    console.print(f"{machine.processor}, {threads} threads, {gflop_s:.0f} GFLOP/s, load {machine.load_average:.1f}")
    models = {"ours fp32": awake(load_model(model)), "ours int8": awake(load_model(model, weights="int8"))}
    twin = transformers_twin(model, models["ours fp32"])
    operations = 2 * multiplications(models["ours fp32"])
    lines = []
    shown = Table("contender", "tokens", "ms, median", "tokens/s", "times HF", "floor ms")
    for num_tokens in map(int, lengths.split(",")):
        runs = {name: our_prefill(each, num_tokens=num_tokens) for name, each in models.items()}
        runs[HF] = their_prefill(twin, num_tokens=num_tokens)
        times = interleaved(runs, num_rounds=rounds, warm_up=1, clock=clock)
        for name, measured in times.items():
            speed_up = None if name == HF else ratio(times[HF], measured)
            took = median_ms(measured)
            line = Line(
                name, num_tokens, took, num_tokens / took * 1e3, speed_up, operations * num_tokens / gflop_s / 1e6
            )
            lines.append(line)
            told = "" if speed_up is None else f"{speed_up:.2f}"
            shown.add_row(
                name, f"{num_tokens:,}", f"{took:.0f}", f"{line.tokens_per_s:.0f}", told, f"{line.floor_ms:.0f}"
            )
    console.print(shown)
    result = {
        "model": model.name,
        "path": models["ours fp32"].decode_path,
        "clock": clock,
        "matrix_gflop_s": gflop_s,
        "lines": [asdict(line) for line in lines],
    }
    print(write_result("prefill", machine, result))


if __name__ == "__main__":
    typer.run(main)
