"""Decode steps on a GPU: ours as recorded graphs and launched freshly, HF's with a key-value cache, on random weights.

    python -m benchmarks.gpu_decode --shapes pythia-2.8b --attention released,hybrid --batches 1,16,64,256

True shapes, bf16, one process, contenders in turn. Our step is the engine's: slots and positions brought by one pinned
copy, model and greedy sampling replayed, tokens sent back by another. HF's is a forward pass of one token a row and an
argmax, with a dynamic and a static cache full of random keys and values. `floor` is the longer of bytes (weights once,
states in and out) over the measured copy bandwidth and operations over the measured matrix rate. Out of memory is a
result: the line says so. `--tiny` runs everything on a CPU, with TRITON_INTERPRET=1 in Triton's interpreter.
Needs torch, transformers and, for plots, matplotlib; no HTTP package. The last line is JSON.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import plots
from benchmarks.costs import step_costs
from benchmarks.gpu_models import ATTENTION, SHAPES, config_of, filled_state, random_model, softmax_twin
from benchmarks.gpu_timing import Ceilings, ceilings, host_ms, interleaved_ms
from benchmarks.transformers_twin import CacheKind, decode_step
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.state import StateBuffer
from server.engine import graph_sampling
from server.engine.cuda_graphs import CudaCapture, DecodeGraphs, eager

CACHES: tuple[CacheKind, ...] = ("dynamic", "static")
Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Line:
    """One contender in one case.

    Attributes:
        num_rows, context: conversations in the step, tokens in each so far (ours does not depend on it).
        ms: median; None: out of memory.
        floor_ms, of_floor: of ours: the least time, and its share of the time taken (1 is the roofline).
        host_ms: of ours: until the host is free again.
        conversation_mib: state, or key-value cache, of one conversation.
    """

    shape: str
    name: str
    num_rows: int
    context: int
    ms: float | None
    tokens_per_s: float | None = None
    floor_ms: float | None = None
    of_floor: float | None = None
    host_ms: float | None = None
    conversation_mib: float | None = None


@dataclass(frozen=True, slots=True)
class Bench:
    """What a run measures with."""

    device: str
    dtype: torch.dtype
    most: Ceilings
    num_rounds: int

    def ours(self, shape: str, attention: str, num_rows: int, context: int, model: DiJiangForCausalLM) -> list[Line]:
        """Recorded and fresh steps."""
        name, lines = f"ours {attention}", []
        with out_of_memory_is_a_result():
            state = filled_state(model, num_rows)
            runs = {f"{name}, recorded": self.recorded_step(model, state, num_rows, context)}
            runs |= {f"{name}, fresh": self.fresh_step(model, state, num_rows, context)}
            times = interleaved_ms(runs, device=self.device, num_rounds=self.num_rounds)
            costs = step_costs(model, num_rows=num_rows)
            floor = self.most.floor_ms(num_bytes=costs.num_bytes, operations=costs.operations)
            for one, run in runs.items():
                line = Line(
                    shape,
                    one,
                    num_rows,
                    context,
                    times[one],
                    num_rows / times[one] * 1e3,
                    floor,
                    floor / times[one],
                    host_ms(run, device=self.device, num_rounds=self.num_rounds),
                    model.state_spec.bytes_per_slot / 2**20,
                )
                lines.append(line)
            runs.clear()
            del state
        return lines or [Line(shape, name, num_rows, context, None)]

    def recorded_step(self, model: DiJiangForCausalLM, state: StateBuffer, num_rows: int, context: int) -> Run:
        """As the engine runs it: one copy each way, model and sampling replayed."""
        is_cuda = torch.device(self.device).type == "cuda"
        graphs = DecodeGraphs(
            model,
            buffer=state,
            last_token_ids=torch.zeros(num_rows + 1, dtype=torch.int64, device=self.device),
            buckets=(num_rows,),
            capture=CudaCapture() if is_cuda else eager,
        )
        graphs.record_sampling("greedy", partial(graph_sampling.choose, kind="greedy"))
        words = torch.cat((torch.arange(1, num_rows + 1), torch.full((num_rows,), context)))
        on_host = torch.empty(num_rows, dtype=torch.int32, pin_memory=is_cuda)
        if is_cuda:
            words = words.pin_memory()

        def step() -> None:
            graphs.feed(num_rows, words.to(self.device, non_blocking=True))
            graphs.forward(num_rows)
            on_host.copy_(graphs.sample(num_rows, "greedy"), non_blocking=True)

        return step

    def fresh_step(self, model: DiJiangForCausalLM, state: StateBuffer, num_rows: int, context: int) -> Run:
        """Every kernel launched by the host."""
        token_ids = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        slots = torch.arange(1, num_rows + 1, device=self.device)
        positions = torch.full((num_rows,), context, device=self.device)

        def step() -> Tensor:
            return model.decode(token_ids, slots=slots, positions=positions, state=state).argmax(-1)

        return step

    def theirs(self, shape: str, num_rows: int, context: int, twin: Any) -> list[Line]:
        """HF's steps with each kind of cache; the cache grows by the measured steps, as it does for a user."""
        config, lines = twin.config, []
        size = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * self.dtype.itemsize
        for kind in CACHES:
            took = None
            with out_of_memory_is_a_result():
                step = decode_step(
                    twin, num_rows=num_rows, num_tokens=context, kind=kind, num_steps=self.num_rounds + 8
                )
                took = interleaved_ms({kind: step}, device=self.device, num_rounds=self.num_rounds)[kind]
                del step
            speed = None if took is None else num_rows / took * 1e3
            lines.append(
                Line(shape, f"HF {kind}", num_rows, context, took, speed, conversation_mib=size * context / 2**20)
            )
        return lines


@contextmanager
def out_of_memory_is_a_result() -> Iterator[None]:
    """Lets a case run out of memory without ending the others, and gives its memory back."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        pass
    finally:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def measure(bench: Bench, arguments: argparse.Namespace) -> list[Line]:
    """All cases, a model at a time."""
    lines: list[Line] = []
    for shape in arguments.shapes:
        for number, attention in enumerate(arguments.attention):
            model = random_model(config_of(shape, attention), device=bench.device, dtype=bench.dtype)
            for num_rows in arguments.batches:
                lines += bench.ours(shape, attention, num_rows, arguments.contexts[0], model)
                _say(lines[-2:])
            if arguments.hf and number == 0:
                twin = softmax_twin(model)
                for context in arguments.contexts:
                    for num_rows in arguments.batches:
                        lines += bench.theirs(shape, num_rows, context, twin)
                        _say(lines[-len(CACHES) :])
                del twin
            del model
    return lines


def best_of(lines: Sequence[Line]) -> list[dict[str, object]]:
    """For each shape and context: the best throughput of ours and of HF, each at the batch that is best for it."""
    found = []
    for shape in dict.fromkeys(line.shape for line in lines):
        own = [line for line in lines if line.shape == shape and line.name.startswith("ours") and line.tokens_per_s]
        if not own:
            continue
        ours = max(own, key=lambda line: line.tokens_per_s or 0.0)
        for context in dict.fromkeys(line.context for line in lines if line.name.startswith("HF")):
            rivals = [line for line in lines if line.shape == shape and line.name.startswith("HF")]
            speeds = [(line.tokens_per_s, line.num_rows) for line in rivals if line.context == context]
            speed, rows = max(((one, rows) for one, rows in speeds if one is not None), default=(None, None))
            ratio = None if speed is None or ours.tokens_per_s is None else ours.tokens_per_s / speed
            found.append(
                {
                    "shape": shape,
                    "context": context,
                    "ours": ours.name,
                    "our_rows": ours.num_rows,
                    "our_tokens_per_s": ours.tokens_per_s,
                    "hf_rows": rows,
                    "hf_tokens_per_s": speed,
                    "times_hf": ratio,
                }
            )
    return found


def _say(lines: Sequence[Line]) -> None:
    for line in lines:
        told = [f"{line.shape:14}", f"{line.name:26}", f"{line.num_rows:4} rows", f"context {line.context:>7,}"]
        if line.ms is None:
            told.append("out of memory")
        else:
            told += [f"{line.ms:9.3f} ms", f"{line.tokens_per_s:10,.0f} tokens/s"]
        if line.floor_ms is not None and line.of_floor is not None and line.host_ms is not None:
            told += [f"floor {line.floor_ms:8.3f} ms", f"{line.of_floor:5.0%} of it", f"host {line.host_ms:7.3f} ms"]
        print("  ".join(told), flush=True)


def draw(folder: Path, lines: Sequence[Line]) -> list[str]:
    """A PNG for each shape: throughput by batch. Empty without matplotlib."""
    if not plots.is_available():
        return []
    files = []
    for shape in dict.fromkeys(line.shape for line in lines):
        own = [line for line in lines if line.shape == shape]
        rows = sorted({line.num_rows for line in own})
        names = {(line.name, line.context) for line in own}
        speeds = {(line.name, line.context, line.num_rows): line.tokens_per_s for line in own}
        series = {
            f"{name}, {context:,}" if name.startswith("HF") else name: [speeds.get((name, context, n)) for n in rows]
            for name, context in sorted(names)
        }
        path = folder / f"gpu-decode-{shape}.png"
        plots.lines(path, title=f"Decode, {shape}", x_label="conversations", x=rows, panels={"tokens/s": series})
        files.append(path.name)
    return files


def numbers(text: str) -> list[int]:
    """1,2,3 -> [1, 2, 3]."""
    return [int(one) for one in text.split(",")]


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode steps on a GPU.")
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=["smollm2-135m", "pythia-2.8b"])
    parser.add_argument("--attention", type=lambda text: text.split(","), default=["pure", "hybrid"])
    parser.add_argument("--batches", type=numbers, default=[1, 16, 64, 256])
    parser.add_argument("--contexts", type=numbers, default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-hf", dest="hf", action="store_false")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU: whether everything runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        arguments.shapes, arguments.device, arguments.rounds = ["tiny"], "cpu", 1
        arguments.batches, arguments.contexts = [1, 2], [8]
    unknown = [name for name in arguments.shapes if name not in SHAPES]
    unknown += [name for name in arguments.attention if name not in ATTENTION]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; shapes are {', '.join(SHAPES)}, attention {', '.join(ATTENTION)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a table, writes plots and results."""
    arguments = arguments_of(argv)
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    most = ceilings(arguments.device, dtype)
    print(f"{most.name}: copy {most.copy_gb_s:,.0f} GB/s, products {most.matrix_tflop_s:,.1f} TFLOP/s")
    lines = measure(Bench(arguments.device, dtype, most, arguments.rounds), arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {
        "benchmark": "gpu-decode",
        "ceilings": asdict(most),
        "lines": [asdict(line) for line in lines],
        "best": best_of(lines),
        "plots": draw(arguments.out, lines),
    }
    name = most.name.lower().replace(" ", "-")
    (arguments.out / f"gpu-decode-{name}-{'-'.join(arguments.shapes)}.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
