"""Decode steps on a GPU: ours as recorded graphs and launched freshly, HF's with a key-value cache, on random weights.

    python -m benchmarks.gpu.decode --shapes pythia-2.8b --attention released,hybrid --batches 1,16,64,256

True shapes, bf16, one process, contenders in turn. Our step is the engine's: slots and positions brought by one pinned
copy, model and greedy sampling replayed, tokens sent back by another. HF's is a forward pass of one token a row and an
argmax, with a dynamic and a static cache full of random keys and values; with `--compile` also compiled. With
`--weights plain,int8,int4` ours have rounded weights, too, beside the floor of their codes' bytes; with
`--states float32,int8` ours runs with states in int8, too. `floor` is the longer of bytes (weights once, states in and
out) over the measured copy bandwidth and operations over the measured matrix rate. A case that fails is a result: its
line says why. `--tiny` runs everything on a CPU, with TRITON_INTERPRET=1 in Triton's interpreter. Needs torch,
transformers and, for plots, matplotlib; no HTTP package. The last line is JSON.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.costs import step_costs
from benchmarks.gpu.command import (
    Journal,
    Line,
    attempt,
    draw,
    dtype_of,
    finish,
    introduce,
    names,
    numbers,
    parsed,
    parser_of,
)
from benchmarks.gpu.models import WEIGHTS, config_of, filled_state, random_model, softmax_twin
from benchmarks.gpu.timing import Ceilings, ceilings, host_ms, interleaved_ms
from dijiang_model.batch import decode
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.serving.network import FrozenModel, freeze
from dijiang_model.state import StateBuffer
from server.engine.fast_steps import graph_sampling
from server.engine.fast_steps.graphs import CudaCapture, DecodeGraphs, eager

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
CACHES = ("dynamic", "static")
COMPILED = "static, compiled"
Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class StepLine(Line):
    """A decode step.

    Attributes:
        num_rows, context: conversations in the step, tokens in each so far (ours does not depend on it).
        ms: median; None: it failed.
        floor_ms, of_floor: of ours: the least time, and its share of the time taken (1 is the roofline).
        host_ms: of ours: until the host is free again.
        conversation_mib: state, or key-value cache, of one conversation.
        failure: why there is no time.
    """

    num_rows: int
    context: int
    ms: float | None
    tokens_per_s: float | None = None
    floor_ms: float | None = None
    of_floor: float | None = None
    host_ms: float | None = None
    conversation_mib: float | None = None
    failure: str | None = None

    def told(self) -> list[str]:
        told = [f"{self.num_rows:4} rows", f"context {self.context:>7,}"]
        if self.ms is None:
            return [*told, str(self.failure)]
        told += [f"{self.ms:9.3f} ms", f"{self.tokens_per_s:10,.0f} tokens/s"]
        if self.floor_ms is not None and self.of_floor is not None and self.host_ms is not None:
            told += [f"floor {self.floor_ms:8.3f} ms", f"{self.of_floor:5.0%} of it", f"host {self.host_ms:7.3f} ms"]
        return told


@dataclass(frozen=True, slots=True)
class Bench:
    """What a run measures with."""

    device: str
    dtype: torch.dtype
    most: Ceilings
    num_rounds: int

    def ours(self, shape: str, name: str, num_rows: int, context: int, model: DiJiangForCausalLM) -> list[StepLine]:
        """Recorded and fresh steps."""
        lines, failure = attempt(partial(self._ours, shape, name, num_rows, context, model))
        return lines if lines is not None else [StepLine(shape, name, num_rows, context, None, failure=failure)]

    def _ours(self, shape: str, name: str, num_rows: int, context: int, model: DiJiangForCausalLM) -> list[StepLine]:
        state, network = filled_state(model, num_rows), freeze(model)
        runs = {f"{name}, recorded": self.recorded_step(network, state, num_rows, context)}
        runs |= {f"{name}, fresh": self.fresh_step(network, state, num_rows, context)}
        times = interleaved_ms(runs, device=self.device, num_rounds=self.num_rounds)
        costs = step_costs(model, num_rows=num_rows)
        floor = self.most.floor_ms(num_bytes=costs.num_bytes, operations=costs.operations)
        return [
            StepLine(
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
            for one, run in runs.items()
        ]

    def recorded_step(self, model: FrozenModel, state: StateBuffer, num_rows: int, context: int) -> Run:
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

    def fresh_step(self, model: FrozenModel, state: StateBuffer, num_rows: int, context: int) -> Run:
        """Every kernel launched by the host."""
        token_ids = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        slots = torch.arange(1, num_rows + 1, device=self.device)
        positions = torch.full((num_rows,), context, device=self.device)

        def step() -> Tensor:
            return decode(model, token_ids, slots=slots, positions=positions, state=state).argmax(-1)

        return step

    def theirs(self, shape: str, num_rows: int, context: int, twin: Any, kind: str) -> StepLine:
        """HF's step with a kind of cache; the cache grows by the measured steps, as it does for a user."""
        config = twin.config
        size = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * self.dtype.itemsize
        took, failure = attempt(partial(self._theirs, num_rows, context, twin, kind))
        return StepLine(
            shape,
            f"HF {kind}",
            num_rows,
            context,
            took,
            None if took is None else num_rows / took * 1e3,
            conversation_mib=size * context / 2**20,
            failure=failure,
        )

    def _theirs(self, num_rows: int, context: int, twin: Any, kind: str) -> float:
        from benchmarks.transformers_twin import decode_step  # ours are measured with any version, and without it

        step = decode_step(
            Compiled(twin) if kind == COMPILED else twin,
            num_rows=num_rows,
            num_tokens=context,
            kind="dynamic" if kind == "dynamic" else "static",
            num_steps=self.num_rounds + 8,
        )
        return interleaved_ms({kind: step}, device=self.device, num_rounds=self.num_rounds)[kind]


class Compiled:
    """A model of HF whose forward pass is compiled, as its `generate` does with a static cache on a GPU."""

    def __init__(self, twin: Any) -> None:
        torch.compiler.reset()  # each number of rows is a case of its own
        self.config, self.device, self.dtype = twin.config, twin.device, twin.dtype
        self._forward: Any = torch.compile(twin.forward, mode="reduce-overhead" if twin.device.type == "cuda" else None)

    def __call__(self, *arguments: object, **keywords: object) -> Any:
        return self._forward(*arguments, **keywords)


def measure(bench: Bench, arguments: argparse.Namespace, journal: Journal[StepLine]) -> None:
    """All cases, a model at a time; of each shape all of ours, then HF's on the first one's weights."""
    for shape in arguments.shapes:
        for attention, weights in product(arguments.attention, arguments.weights):
            if journal.may_begin():
                case = partial(_measure_ours, bench, arguments, journal, shape, attention, weights)
                _, failure = attempt(case)
                if failure is not None:
                    journal.add(failed(shape, our_name(attention, weights, arguments.states[0]), failure))
        if arguments.hf and journal.may_begin():
            _, failure = attempt(partial(_measure_theirs, bench, arguments, journal, shape))
            if failure is not None:
                journal.add(failed(shape, "HF", failure))


def failed(shape: str, name: str, failure: str) -> StepLine:
    """The line of a contender that could not even be made."""
    return StepLine(shape, name, 0, 0, None, failure=failure)


def _measure_ours(
    bench: Bench, arguments: argparse.Namespace, journal: Journal[StepLine], shape: str, attention: str, weights: str
) -> None:
    model = random_model(
        config_of(shape, attention), device=bench.device, dtype=bench.dtype, quantization=WEIGHTS[weights]
    )
    for states, num_rows in product(arguments.states, arguments.batches):
        if journal.may_begin():
            model.keep_states_in(STATE_DTYPES[states])
            name = our_name(attention, weights, states)
            for line in bench.ours(shape, name, num_rows, arguments.contexts[0], model):
                journal.add(line)


def our_name(attention: str, weights: str, states: str) -> str:
    """`ours pure`, with weights or states in fewer bits `ours pure, int8 weights/int8`."""
    rounded = "" if weights == "plain" else f", {weights} weights"
    return f"ours {attention}{rounded}" + ("" if states == "float32" else f"/{states}")


def _measure_theirs(bench: Bench, arguments: argparse.Namespace, journal: Journal[StepLine], shape: str) -> None:
    config = config_of(shape, arguments.attention[0])
    twin = softmax_twin(random_model(config, device=bench.device, dtype=bench.dtype))
    kinds = [*CACHES, COMPILED] if arguments.compile else CACHES
    for context in arguments.contexts:
        for num_rows in arguments.batches:
            for kind in kinds:
                if journal.may_begin():
                    journal.add(bench.theirs(shape, num_rows, context, twin, kind))


def best_of(lines: Sequence[StepLine]) -> list[dict[str, object]]:
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


def plotted(arguments: argparse.Namespace, lines: Sequence[StepLine]) -> list[str]:
    """A PNG for each shape: throughput by batch."""
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
        title = f"Decode, {shape}"
        files += draw(arguments, f"gpu-decode-{shape}.png", title=title, x_label="conversations", x=rows, series=series)
    return files


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("Decode steps on a GPU.", num_rounds=30)
    parser.add_argument("--batches", type=numbers, default=[1, 16, 64, 256])
    parser.add_argument("--contexts", type=numbers, default=[2048, 8192])
    parser.add_argument(
        "--states", type=names, default=["float32"], help=f"what ours are in: {', '.join(STATE_DTYPES)}"
    )
    parser.add_argument(
        "--weights",
        type=names,
        default=["plain"],
        help=f"ours: {', '.join(WEIGHTS)}; HF's need plain",
    )
    parser.add_argument("--compile", action="store_true", help="HF's step with a static cache compiled, too")
    arguments = parsed(parser, argv, tiny={"batches": [1, 2], "contexts": [8]})
    unknown = [name for name in arguments.states if name not in STATE_DTYPES]
    if unknown:
        parser.error(f"unknown states: {', '.join(unknown)}; they are in {', '.join(STATE_DTYPES)}")
    unknown = [name for name in arguments.weights if name not in WEIGHTS]
    if unknown:
        parser.error(f"unknown weights: {', '.join(unknown)}; they are {', '.join(WEIGHTS)}")
    if arguments.hf and arguments.weights[0] != "plain":
        parser.error("HF's model takes the first of --weights, which must be plain; or say --no-hf")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a table, writes plots and results."""
    arguments = arguments_of(argv)
    dtype = dtype_of(arguments.device)
    most = ceilings(arguments.device, dtype)
    introduce(most)
    journal = Journal[StepLine].of("gpu-decode", arguments)
    measure(Bench(arguments.device, dtype, most, arguments.rounds), arguments, journal)
    best = best_of(journal.lines)
    for one in best:
        journal.note(one)
    finish(journal, arguments, most, {"best": best}, plotted(arguments, journal.lines))


if __name__ == "__main__":
    main()
