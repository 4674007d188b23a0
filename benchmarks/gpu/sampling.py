"""Choosing a step's tokens on a GPU: our kernel beside torch's sorts, each recorded, from the logits on.

    python -m benchmarks.gpu.sampling --vocabularies 49152,151936 --batches 1,16,64,256,512

Random logits of standard deviation 3, one process, contenders in turn. `floor` is reading the logits once at the
measured copy bandwidth. A case that fails, for want of memory say, is a result: its line says why. `--tiny` runs
everything on a CPU, with TRITON_INTERPRET=1 the kernel too, in Triton's interpreter. The last line is JSON.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product

import torch
from torch import Tensor

from benchmarks.gpu.command import Journal, Line, attempt, finish, introduce, numbers, parsed, parser_of
from benchmarks.gpu.timing import Ceilings, ceilings, interleaved_ms
from dijiang_model.ops.drawing import Draws
from dijiang_model.ops.torch import drawing as torch_drawing
from server.engine.fast_steps.graphs import CudaCapture, Work, eager

SPREAD = 3.0
FILTERS: Mapping[str, Mapping[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50": {"top_k": 50},
    "top-k 50, top-p 0.95, min-p 0.02": {"top_k": 50, "top_p": 0.95, "min_p": 0.02},
}


@dataclass(frozen=True, slots=True)
class SamplingLine(Line):
    """So many rows of so many logits, all with one of `FILTERS`; `ms` None: `failure` says why."""

    num_rows: int
    vocab_size: int
    filters: str
    ms: float | None
    of_floor: float | None = None
    failure: str | None = None

    def told(self) -> list[str]:
        told = [f"{self.num_rows:4} rows", f"{self.vocab_size:>8,} logits", f"{self.filters:34}"]
        if self.ms is None or self.of_floor is None:
            return [*told, str(self.failure)]
        return [*told, f"{self.ms:9.3f} ms", f"{self.of_floor:5.0%} of the floor"]


def draws_of(filters: str, num_rows: int, vocab_size: int, device: str) -> Draws:
    """Evenly spread uniform numbers, and the same filters for every row."""
    numbers_of = FILTERS[filters]

    def column(name: str, off: float, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.full((num_rows,), numbers_of.get(name, off), dtype=dtype, device=device)

    uniforms = torch.arange(num_rows, dtype=torch.float64, device=device) / num_rows
    draws = Draws(uniforms, column("temperature", 1.0), column("min_p", 0.0))
    if not {"top_k", "top_p"} & numbers_of.keys():
        return draws
    top_k = column("top_k", vocab_size, torch.int64)
    return replace(draws, top_k=top_k, max_top_k=vocab_size, top_p=column("top_p", 2.0))


def contenders(device: str, logits: Tensor, draws: Draws, filters: str) -> dict[str, Work]:
    """Both, recorded; the kernel where it runs."""
    capture = CudaCapture() if torch.device(device).type == "cuda" else eager
    works: dict[str, Work] = {
        "torch": partial(torch_drawing.chosen_tokens, logits, draws, is_greedy=filters == "greedy")
    }
    is_emulated = os.environ.get("TRITON_INTERPRET") == "1"
    if find_spec("triton") is not None and (torch.device(device).type == "cuda" or is_emulated):
        from dijiang_model.ops.triton import drawing

        works = {"kernel": partial(drawing.drawn_tokens, logits, draws, is_checked=True), **works}
    with torch.inference_mode():
        return {name: capture(work) for name, work in works.items()}


def measure(arguments: argparse.Namespace, most: Ceilings, journal: Journal[SamplingLine]) -> None:
    """All cases."""
    device = arguments.device
    for vocab_size, num_rows, filters in product(arguments.vocabularies, arguments.batches, FILTERS):
        if not journal.may_begin():
            continue
        about = (num_rows, vocab_size, filters)

        def case(num_rows: int = num_rows, vocab_size: int = vocab_size, filters: str = filters) -> dict[str, float]:
            logits = SPREAD * torch.randn(num_rows, vocab_size, device=device)
            runs = contenders(device, logits, draws_of(filters, num_rows, vocab_size, device), filters)
            return interleaved_ms(runs, device=device, num_rounds=arguments.rounds)

        times, failure = attempt(case)
        if times is None:
            journal.add(SamplingLine("sampling", "kernel and torch", *about, None, failure=failure))
            continue
        floor = most.floor_ms(num_bytes=4 * num_rows * vocab_size, operations=0)
        for name, ms in times.items():
            journal.add(SamplingLine("sampling", name, *about, ms, floor / ms))


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("Choosing tokens on a GPU.", num_rounds=30)
    parser.add_argument("--batches", type=numbers, default=[1, 16, 64, 256, 512])
    parser.add_argument("--vocabularies", type=numbers, default=[49_152, 151_936])
    arguments = parsed(parser, argv, tiny={"batches": [1, 2], "vocabularies": [300]})
    arguments.shapes = ["sampling"]
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a table, writes results."""
    arguments = arguments_of(argv)
    most = ceilings(arguments.device, torch.float32)
    introduce(most)
    journal = Journal[SamplingLine].of("gpu-sampling", arguments)
    measure(arguments, most, journal)
    finish(journal, arguments, most, {}, [])


if __name__ == "__main__":
    main()
