"""Decode steps on a CPU, side by side with HF transformers on the same base weights.

    python benchmarks/decode.py --threads 2

Every round times one step of each contender in turn: ours with fp32 and with int8 weights, HF with its
dynamic and its static key-value cache (sdpa, filled with random keys and values up to the context), all
followed by an argmax. Ratios are medians over rounds, so that other work on the machine cancels out.
The mixing weights are set to 1 here: an untrained model's are 0, which would spare us the far read-out.
`floor` is weights and states once through memory at the measured rate. The last line is JSON.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import CLOCKS, best_ms, interleaved, median_ms, ratio, this_machine, write_result
from benchmarks.transformers_twin import decode_step, transformers_twin
from dijiang_model.checkpoints import load_model
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.state import StateBuffer

DEFAULT_MODEL = Path.home() / ".cache/dijiang/models/smollm2-135m-dijiang"
CASES = ((1, 128), (1, 4096), (16, 2048))
NEAR, FAR = 1_000, 100_000
CACHES = ("dynamic", "static")
OURS = ("fp32", "int8")


@dataclass(frozen=True, slots=True)
class Line:
    """One contender in one case.

    Attributes:
        num_rows, context: conversations in the step, tokens in each so far.
        speed_up: over HF's better cache in the same rounds; None for HF itself.
        floor_ms: bytes that must move, at the measured rate; None for HF.
        conversation_mib: state, or key-value cache, of one conversation.
    """

    name: str
    num_rows: int
    context: int
    median_ms: float
    best_ms: float
    tokens_per_s: float
    speed_up: float | None
    floor_ms: float | None
    conversation_mib: float


def awake(model: DiJiangForCausalLM) -> DiJiangForCausalLM:
    """Lets the linear part speak in every head, as in a trained model."""
    for attention in model.attentions:
        if attention.linear.attention.window > 0:
            attention.linear.mix_bias.fill_(0.0)
    return model


def our_step(model: DiJiangForCausalLM, *, num_rows: int, position: int) -> Callable[[], torch.Tensor]:
    """One decode step of `num_rows` conversations, then the largest logit of each."""
    state = StateBuffer(model.state_spec, num_rows + 1)
    state.storage.zero_()
    token_ids, slots = torch.full((num_rows,), 500), torch.arange(1, num_rows + 1)
    positions = torch.full((num_rows,), position)

    def step() -> torch.Tensor:
        logits = model.decode(token_ids, slots=slots, positions=positions, state=state)
        positions.add_(1)
        return logits.argmax(-1)

    return step


def bytes_per_step(model: DiJiangForCausalLM, *, num_rows: int) -> int:
    """Weights once, and of each conversation the linear state in and out and the near tokens in."""
    head = model.head_weight.numel() * 4 if model.int8_head is None else model.int8_head.num_bytes
    weights = head
    for block in model.blocks:
        weights += sum(parameter.numel() * parameter.element_size() for parameter in block.parameters())
        weights += sum(m.quantized.num_bytes for m in block.modules() if hasattr(m, "quantized"))
    states = 0
    for tensor in model.state_spec.tensors:
        is_near = tensor.name.endswith(("near_keys", "near_values"))
        states += tensor.num_bytes * (1 if is_near else 2)
    return weights + num_rows * states


def run_case(
    models: dict[str, DiJiangForCausalLM],
    twin: object,
    *,
    num_rows: int,
    context: int,
    num_rounds: int,
    gb_s: float,
    clock: str,
) -> list[Line]:
    """All contenders in one case."""
    steps = {name: our_step(model, num_rows=num_rows, position=context) for name, model in models.items()}
    config = models["fp32"].config
    for kind in CACHES:
        steps[f"HF {kind}"] = decode_step(
            twin, num_rows=num_rows, num_tokens=context, kind=kind, num_steps=num_rounds + 4
        )
    times = interleaved(steps, num_rounds=num_rounds, clock=clock)
    rival = min((f"HF {kind}" for kind in CACHES), key=lambda name: median_ms(times[name]))
    cache_bytes = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_size * context
    lines = []
    for name, measured in times.items():
        model = models.get(name)
        is_ours = model is not None
        held = model.state_spec.bytes_per_slot if is_ours else cache_bytes
        lines.append(
            Line(
                name=f"ours {name}" if is_ours else name,
                num_rows=num_rows,
                context=context,
                median_ms=median_ms(measured),
                best_ms=best_ms(measured),
                tokens_per_s=num_rows / median_ms(measured) * 1e3,
                speed_up=ratio(times[rival], measured) if is_ours else None,
                floor_ms=bytes_per_step(model, num_rows=num_rows) / gb_s / 1e6 if is_ours else None,
                conversation_mib=held / 2**20,
            )
        )
    return lines


def flatness(model: DiJiangForCausalLM, *, num_rounds: int, clock: str) -> float:
    """Time per token at position 100,000 over that at 1,000, rounds taken in turn."""
    steps = {str(at): our_step(model, num_rows=1, position=at) for at in (NEAR, FAR)}
    times = interleaved(steps, num_rounds=num_rounds, clock=clock)
    return ratio(times[str(FAR)], times[str(NEAR)])


def table(lines: list[Line]) -> Table:
    shown = Table(
        "contender", "rows", "context", "ms, median", "ms, best", "tokens/s", "times HF", "floor ms", "MiB each"
    )
    for line in lines:
        shown.add_row(
            line.name,
            str(line.num_rows),
            f"{line.context:,}",
            f"{line.median_ms:.1f}",
            f"{line.best_ms:.1f}",
            f"{line.tokens_per_s:.1f}",
            "" if line.speed_up is None else f"{line.speed_up:.2f}",
            "" if line.floor_ms is None else f"{line.floor_ms:.1f}",
            f"{line.conversation_mib:.1f}",
        )
    return shown


def main(
    model: Annotated[Path, typer.Option(help="Folder of a LLaMA-family model.")] = DEFAULT_MODEL,
    threads: Annotated[int, typer.Option(help="Threads of both sides.")] = 1,
    rounds: Annotated[int, typer.Option(help="Steps of each contender in each case.")] = 30,
    clock: Annotated[str, typer.Option(help="wall, or cpu: this process alone (one thread, busy machine).")] = "wall",
) -> None:
    """Measures decode steps and writes them to benchmarks/results/."""
    console = Console(width=120)
    if clock not in CLOCKS or (clock == "cpu" and threads != 1):
        raise typer.BadParameter("--clock is wall or cpu, and cpu needs --threads 1")
    torch.set_num_threads(threads)
    machine = this_machine(clock)
    console.print(
        f"{machine.processor}, {threads} threads, {machine.read_gb_s:.1f} GB/s, load {machine.load_average:.1f}"
    )
    models = {"fp32": awake(load_model(model)), "int8": awake(load_model(model, weights="int8"))}
    console.print(f"decode path: {models['fp32'].decode_path}, int8 {models['int8'].decode_path}")
    twin = transformers_twin(model, models["fp32"])
    lines: list[Line] = []
    for num_rows, context in CASES:
        lines += run_case(
            models, twin, num_rows=num_rows, context=context, num_rounds=rounds, gb_s=machine.read_gb_s, clock=clock
        )
    console.print(table(lines))
    flat = {name: flatness(each, num_rounds=4 * rounds, clock=clock) for name, each in models.items()}
    for name, value in flat.items():
        console.print(f"ours {name}: a token at position {FAR:,} takes {value:.3f} times one at {NEAR:,}")
    result = {
        "model": model.name,
        "decode_path": models["fp32"].decode_path,
        "cpus": os.cpu_count(),
        "clock": clock,
        "lines": [asdict(line) for line in lines],
        "position_100000_over_1000": flat,
    }
    print(write_result("decode", machine, result))


if __name__ == "__main__":
    typer.run(main)
