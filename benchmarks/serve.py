"""The service over a real socket: concurrent clients that stream, against a running server or one of our own.

    dijiang bench serve --clients 1,4,16,64 --threads 1
    dijiang bench serve --base-url http://localhost:8000

Throughput, time to the first token, and time between tokens, by the number of clients. `step` is the mean time of the
engine's steps that read no prompt, by its own account (/metrics). With one client, `engine` is what it takes beyond the
model's step alone, and `service` what a token takes beyond the engine's: medians over rounds in which the model and the
server take turns, since a machine's rates drift. A server of our own is measured against its floor too: weights and
states through memory, or the operations of a step, at this machine's rates. It drafts nothing unless `--speculate`
says so: a step with drafts is none of one token.
"""

import asyncio
import contextlib
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.table import Table

from benchmarks import plots, report
from benchmarks.load import PERCENTILES, Load, Seen, percentiles_ms
from benchmarks.machine import Machine, interleaved, kind_of_twin, median_ms
from benchmarks.own_server import ServerStartError, serving
from clients.client import Client
from clients.errors import APIResponseError, ClientError
from dijiang_model.errors import ModelError

METRICS = ("dijiang_decode_token_seconds_count", "dijiang_decode_token_seconds_sum")
SERVED = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
"""Kinds of weights as `dijiang serve --dtype` calls them."""
NUM_TURNS = 8
"""How often steps of the model and answers of the server take turns, with one client."""
STEPS_A_TURN = 16


@dataclass(frozen=True, slots=True)
class Line:
    """One number of clients.

    Attributes:
        num_tokens: of all answers.
        tokens_per_s: of all clients together, prompts' time included.
        first_token_ms, between_tokens_ms: percentiles over requests and over tokens.
        engine_step_ms: mean decode step of the engine as its rows see it; None where it does not say.
        engine_share: with one client, how much of that is not the model's step; None where that was not measured.
        service_share: with one client, how much of the mean time between tokens is not the engine's.
        floor_ms: the least time of a decode step of so many rows; None for a server that was running already.
    """

    num_clients: int
    num_tokens: int
    tokens_per_s: float
    first_token_ms: dict[str, float]
    between_tokens_ms: dict[str, float]
    engine_step_ms: float | None
    engine_share: float | None
    service_share: float | None
    floor_ms: float | None


@dataclass(frozen=True, slots=True)
class Counters:
    """The engine's totals: tokens from steps that read no prompt, and the seconds that they took."""

    tokens: float
    seconds: float

    def mean_ms_since(self, before: "Counters") -> float | None:
        """Of a token's step; None without any."""
        tokens = self.tokens - before.tokens
        return 1e3 * (self.seconds - before.seconds) / tokens if tokens > 0 else None


@dataclass(frozen=True, slots=True)
class Shares:
    """With one client, medians over turns.

    Attributes:
        model_step_ms: a decode step without engine and service.
        engine: how much of the engine's step is not the model's.
        service: how much of the mean time between tokens is not the engine's step.
    """

    model_step_ms: float
    engine: float
    service: float


@dataclass(frozen=True, slots=True)
class Target:
    """The server under load.

    Attributes:
        model_step: a decode step of one conversation without engine and service; None for a server of somebody else.
        floors_ms: by number of clients.
    """

    address: str
    api_key: str | None
    model: str
    model_step: Callable[[], object] | None
    floors_ms: dict[int, float]

    def shares(self, load: Load) -> "Shares | None":
        """What engine and service add to one client's step; None where no turn could measure it."""
        if self.model_step is None:
            return None
        turns = []
        for _ in range(NUM_TURNS):
            model_ms = median_ms(interleaved({"step": self.model_step}, num_rounds=STEPS_A_TURN)["step"])
            _, answers, step_ms = self._run(replace(load, num_requests=1), 1)
            gaps = [gap for seen in answers for gap in seen.gaps_s]
            if step_ms is None or not gaps:  # on a busy machine all tokens of a short answer may arrive at once
                continue
            turns.append((model_ms, 1 - model_ms / step_ms, 1 - step_ms / (1e3 * statistics.fmean(gaps))))
        return Shares(*(statistics.median(values) for values in zip(*turns, strict=True))) if turns else None

    def measure(self, load: Load, num_clients: int, shares: "Shares | None") -> Line:
        """One run with so many clients."""
        seconds, answers, step_ms = self._run(load, num_clients)
        gaps = [gap for seen in answers for gap in seen.gaps_s]
        num_tokens = sum(seen.num_tokens for seen in answers)
        return Line(
            num_clients=num_clients,
            num_tokens=num_tokens,
            tokens_per_s=num_tokens / seconds,
            first_token_ms=percentiles_ms([seen.first_s for seen in answers]),
            between_tokens_ms=percentiles_ms(gaps),
            engine_step_ms=step_ms,
            engine_share=None if shares is None else shares.engine,
            service_share=None if shares is None else shares.service,
            floor_ms=self.floors_ms.get(num_clients),
        )

    def _run(self, load: Load, num_clients: int) -> tuple[float, list[Seen], float | None]:
        before = self._counters()
        seconds, answers = asyncio.run(load.run(self.address, self.api_key, self.model, num_clients))
        after = self._counters()
        return seconds, answers, None if before is None or after is None else after.mean_ms_since(before)

    def _counters(self) -> Counters | None:
        """From /metrics; None where another kind of server answers, or lets nobody read them."""
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        try:
            text = httpx.get(f"{self.address}/metrics", headers=headers, timeout=10).text
        except httpx.TransportError:
            return None
        found = [re.findall(rf"^{name}\{{.*\}} (\S+)$", text, re.MULTILINE) for name in METRICS]
        return Counters(*(sum(map(float, values)) for values in found)) if all(found) else None


def table(lines: list[Line]) -> Table:
    shares = [f"p{share}" for share in PERCENTILES]
    headings = [
        "clients",
        "tokens/s",
        *(f"first, {share}" for share in shares),
        *(f"next, {share}" for share in shares),
        *("step ms", "engine", "service", "floor ms"),
    ]
    shown = Table(*headings, title="ms to the first token, ms between tokens")
    for line in lines:
        shown.add_row(
            str(line.num_clients),
            f"{line.tokens_per_s:.1f}",
            *(f"{line.first_token_ms[share]:.0f}" for share in shares),
            *(f"{line.between_tokens_ms[share]:.1f}" if line.between_tokens_ms else "" for share in shares),
            "" if line.engine_step_ms is None else f"{line.engine_step_ms:.1f}",
            "" if line.engine_share is None else f"{line.engine_share:.1%}",
            "" if line.service_share is None else f"{line.service_share:.1%}",
            "" if line.floor_ms is None else f"{line.floor_ms:.1f}",
        )
    return shown


def draw(lines: list[Line], path: Path) -> None:
    """Throughput and latencies by clients."""
    plots.lines(
        path,
        title="Serving",
        x_label="clients",
        x=[line.num_clients for line in lines],
        panels={
            "tokens/s": {"all clients": [line.tokens_per_s for line in lines]},
            "ms to the first token": {
                f"p{share}": [line.first_token_ms[f"p{share}"] for line in lines] for share in PERCENTILES
            },
            "ms between tokens": {
                f"p{share}": [line.between_tokens_ms.get(f"p{share}") for line in lines] for share in PERCENTILES
            },
        },
    )


def serve_command(
    model: report.ModelFolder = None,
    base_url: Annotated[str | None, typer.Option(help="A running server; one is started if absent.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="DIJIANG_API_KEY", help="Of the running server.")] = None,
    clients: Annotated[str, typer.Option(help="Numbers of concurrent clients, with commas.")] = "1,4,16",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of every prompt.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="Length of every answer.")] = 128,
    requests: Annotated[int, typer.Option(min=1, help="Answers for each client, one after the other.")] = 1,
    weights: Annotated[str, typer.Option(help=f"Of a server of our own: {', '.join(SERVED)}.")] = "fp32",
    speculate: Annotated[str, typer.Option(help="Of a server of our own: 0, a number, or auto as by default.")] = "0",
    device: report.Device = "cpu",
    threads: report.Threads = None,
    only_json: report.OnlyJson = False,
    plot: report.Plot = None,
    save: report.Save = None,
) -> None:
    """Put concurrent streaming clients on a server, over a real socket: throughput and latencies."""
    told = report.Report("serve", only_json, plot, save)
    report.prepare(threads, "wall", device)
    numbers = report.numbers(clients, "--clients")
    kind = report.word(weights, "--weights", tuple(SERVED))
    if base_url is not None and model is not None:
        raise typer.BadParameter("a running server has its own model", param_hint="MODEL")
    load = Load(prompt_tokens, tokens, requests)
    options = ["--speculate", speculate, *([] if threads is None else ["--threads", str(threads)])]
    machine = report.measured_machine("wall", device, [kind_of_twin(kind)])
    told.introduce(machine)
    try:
        with ExitStack() as stack:
            if base_url is not None:
                address = base_url.removesuffix("/").removesuffix("/v1")
                target = Target(address, api_key, first_model(address, api_key), None, {})
            else:
                folder = report.model_folder(model)
                target = stack.enter_context(
                    own_target(folder, kind, options, device=device, numbers=numbers, machine=machine)
                )
            target.measure(replace(load, num_requests=1), 1, None)  # the first are slower: memory, threads, caches
            shares = target.shares(load) if 1 in numbers else None
            lines = []
            for number in numbers:
                lines.append(target.measure(load, number, shares if number == 1 else None))
                told.console.print(f"{number} clients: {lines[-1].tokens_per_s:.1f} tokens/s", highlight=False)
    except (ServerStartError, ClientError, ModelError) as error:
        raise report.failed(error) from error
    result = {
        "model": target.model,
        "device": device if base_url is None else None,
        "weights": kind if base_url is None else None,
        "server": "own" if base_url is None else "running",
        "speculate": speculate if base_url is None else None,
        **asdict(load),
        "model_step_ms": None if shares is None else shares.model_step_ms,
        "lines": [asdict(line) for line in lines],
    }
    if shares is not None:
        told.note(f"One decode step without engine and service takes {shares.model_step_ms:.1f} ms.")
    told.finish(machine, result, table(lines), lambda file: draw(lines, file))


@contextlib.contextmanager
def own_target(
    folder: Path, kind: str, options: list[str], *, device: str, numbers: list[int], machine: Machine
) -> Iterator[Target]:
    """A server of our own, and its model alone."""
    # Imported late: `--help` and a running server need nothing of torch.
    from benchmarks.contenders import load_weights, our_step
    from benchmarks.costs import step_costs

    network = load_weights(folder, kind, device=device)
    floors = {number: step_costs(network, num_rows=number).floor_ms(machine) for number in numbers}
    step = our_step(network, num_rows=1, position=128) if 1 in numbers else None
    own = ["--device", device, "--dtype", SERVED[kind], "--max-conversations", str(max(numbers))]
    with serving(folder, *own, *options) as address:
        yield Target(address, None, first_model(address, None), step, floors)


def first_model(address: str, api_key: str | None) -> str:
    """The name that a server answers to.

    Raises:
        ClientError: it cannot be asked, or serves nothing.
    """
    with Client(address, api_key=api_key) as client:
        models = client.models()
    if not models:
        raise APIResponseError("the server serves no model")
    return models[0].id


if __name__ == "__main__":
    typer.run(serve_command)
