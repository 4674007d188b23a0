"""What a grammar costs: tokens per second of a full batch with and without a JSON schema.

    python benchmarks/experiments/structured.py --requests 16 --tokens 32

Runs the engine itself, without HTTP, on the default model (or `--model FOLDER`). Both runs generate the same number of
tokens at temperature 1; the schema is one that no answer completes in so few. Runs alternate, so that a busy neighbour
disturbs both alike. Ends with one JSON line.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import CLOCKS, interleaved, this_machine, write_result
from dijiang_model.conversion.default_model import ensure_default_model
from server.engine.engine import Engine
from server.engine.grammars.grammar import HEADER
from server.engine.loading import load_engine
from server.engine.types.requests import EngineConfig, FinishReason, GenerationRequest, GrammarSpec, SamplingParams
from server.grammar_check.sources import schema_text

SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 3, "maxLength": 40},
            "kind": {"enum": ["person", "place", "thing"]},
            "scores": {"type": "array", "minItems": 2, "items": {"type": "number"}},
            "parent": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"id": {"type": "integer"}}}]},
        },
        "required": ["name", "kind", "scores", "parent"],
        "additionalProperties": False,
    },
}
GRAMMAR = GrammarSpec(f"{HEADER}start: %json {schema_text(SCHEMA, strict=True)}")


@dataclass(slots=True)
class Bench:
    """A loaded engine and the load to put on it."""

    engine: Engine
    num_requests: int
    num_tokens: int
    num_runs: int = 0

    def run(self, grammar: GrammarSpec | None) -> None:
        """All requests at once, to their last token."""
        self.num_runs += 1
        for number in range(self.num_requests):
            sampling = SamplingParams(max_tokens=self.num_tokens, ignore_eos=True, seed=number)
            prompt = tuple(range(100 + number, 116 + number))
            request = GenerationRequest(f"{self.num_runs}/{number}", prompt, sampling, grammar=grammar)
            assert self.engine.add(request) is None
        reasons = []
        while self.engine.has_work:
            reasons += [event.finish_reason for event in self.engine.step() if event.finish_reason is not None]
        assert reasons == [FinishReason.LENGTH] * self.num_requests


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of the model.")] = None,
    device: str = "cpu",
    dtype: str = "float32",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    requests: Annotated[int, typer.Option(min=1)] = 16,
    tokens: Annotated[int, typer.Option(min=2)] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    clock: Annotated[str, typer.Option(help="`cpu` counts this process alone.")] = "wall",
) -> None:
    """Compare the throughput of constrained and free answers."""
    if clock not in CLOCKS:
        raise typer.BadParameter(f"must be one of {', '.join(CLOCKS)}", param_hint="--clock")
    engine = load_engine(
        EngineConfig(
            model_path=str(ensure_default_model(None) if model is None else model),
            device=device,
            weights_dtype=dtype,
            num_threads=threads,
            state_memory_bytes=requests << 26,
            max_num_slots=requests,
            max_step_tokens=512,
            max_waiting=requests,
        )
    )
    machine = this_machine(clock)
    bench = Bench(engine, requests, tokens)
    times = interleaved(
        {"free": lambda: bench.run(None), "schema": lambda: bench.run(GRAMMAR)},
        num_rounds=rounds,
        warm_up=1,
        clock=clock,
    )
    rates = {name: requests * tokens / statistics.median(seconds) for name, seconds in times.items()}
    cost = 1 - statistics.median(free / schema for free, schema in zip(times["free"], times["schema"], strict=True))
    table = Table("answers", "tokens/s", title=f"{requests} requests of {tokens} tokens, {machine.processor}")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.1f}")
    console = Console()
    console.print(table)
    console.print(f"A schema costs {cost:.1%} of throughput.")
    result = {
        "device": engine.info.device_name,
        "clock": clock,
        "num_requests": requests,
        "num_tokens": tokens,
        "num_rounds": rounds,
        "tokens_per_s": rates,
        "cost": cost,
    }
    print(write_result("structured", machine, result))


if __name__ == "__main__":
    typer.run(main)
