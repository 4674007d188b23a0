"""Answers with and without guessed tokens, in turn: what speculation gains where text repeats, and costs where not.

    python benchmarks/experiments/speculation.py --clock cpu

Each task is answered by two engines around the same weights, one of which speculates. Their tokens must be the same.
The prompt is read outside of the timed part. The last line is JSON.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import CLOCKS, interleaved, median_ms, ratio, this_machine, write_result
from benchmarks.report import words
from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.conversion.default_model import ensure_default_model
from dijiang_model.serving.network import freeze
from server.engine.engine import Engine
from server.engine.loading import build_engine
from server.engine.speculation.rules import DEFAULT_MAX_DRAFTS
from server.engine.types.requests import EngineConfig, GenerationRequest, SamplingParams
from server.text.template import ChatMessage, ChatTemplate
from server.text.tokenizer import Tokenizer, load_tokenizer

_QUOTE = (
    "Repeat this text exactly: The old lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote the "
    "weather in his book. Nobody ever read the book, but he wrote it anyway, every evening, for thirty years."
)
_ITEMS = json.dumps({"items": [{"name": name, "price": price} for name, price in (("apple", 3), ("pear", 4))]})
_JSON = f"Change the price of the pear to 5 and print the JSON again:\n{_ITEMS}"
_CODE = (
    "Rename the variable x to total in this code and print it again:\n```python\n"
    "def add(values):\n    x = 0\n    for value in values:\n        x = x + value\n    return x\n```"
)
_EMAIL = "Write an email that invites a colleague named {} to a meeting on {} about the budget."
_TABLE = "Write a CSV table of ten countries with columns name, capital, continent."
_STORY = "Tell a story about a fox who wants to learn to fly."


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked for.

    Attributes:
        num_requests: how many ask for it at once, each in a conversation of its own.
        predicted_by: its answer without drafts is what this one's is expected to be; None: nothing is expected.
    """

    name: str
    prompt: str
    temperature: float = 0.0
    num_requests: int = 1
    predicted_by: str | None = None


TASKS = (
    Task("quote a text", _QUOTE),
    Task("edit JSON", _JSON),
    Task("edit code", _CODE),
    Task("email", _EMAIL.format("Peter", "Friday")),
    Task(
        "email, another one predicted", _EMAIL.format("Peter", "Friday"), predicted_by=_EMAIL.format("Anna", "Monday")
    ),
    Task("table", _TABLE),
    Task("story", _STORY),
    Task("story, predicted word for word", _STORY, predicted_by=_STORY),
    Task("story, temperature 1", _STORY, temperature=1.0),
    Task("table, 8 at once", _TABLE, num_requests=8),
    Task("story, 8 at once", _STORY, num_requests=8),
)


@dataclass(frozen=True, slots=True)
class Line:
    """One task with weights of one kind; milliseconds for each token of each answer, medians.

    Attributes:
        drafted, accepted: guesses in one run, and those that were right.
        speed_up: of the median round.
    """

    task: str
    weights: str
    num_tokens: int
    plain_ms: float
    speculating_ms: float
    speed_up: float
    drafted: int
    accepted: int


class Answers:
    """Runs a task in one engine, prompts first and apart."""

    def __init__(self, engine: Engine, requests: list[GenerationRequest]) -> None:
        self._engine = engine
        self._requests = requests
        self._num_runs = 0
        self.tokens: dict[int, list[int]] = {}

    def read_prompts(self) -> None:
        """Up to the first token of every answer."""
        self.tokens = {number: [] for number in range(len(self._requests))}
        self._num_runs += 1
        for number, request in enumerate(self._requests):
            assert self._engine.add(replace(request, request_id=f"{self._num_runs}/{number}")) is None
        while not all(self.tokens.values()):
            self._step()

    def answer(self) -> None:
        """All the rest."""
        while self._engine.has_work:
            self._step()

    def _step(self) -> None:
        for event in self._engine.step():
            self.tokens[int(event.request_id.partition("/")[2])] += event.token_ids


def requests_of(
    task: Task, tokenizer: Tokenizer, num_tokens: int, *, predicted: tuple[int, ...] = ()
) -> list[GenerationRequest]:
    prompt = ChatTemplate(tokenizer).encode([ChatMessage(role="user", content=task.prompt)])
    return [
        GenerationRequest(
            str(seed),
            tuple(prompt),
            SamplingParams(max_tokens=num_tokens, temperature=task.temperature, seed=seed),
            predicted_token_ids=predicted,
        )
        for seed in range(task.num_requests)
    ]


def measure(
    task: Task, engines: dict[str, Engine], tokenizer: Tokenizer, *, weights: str, tokens: int, rounds: int, clock: str
) -> Line:
    """Both engines in turn."""
    predicted: tuple[int, ...] = ()
    if task.predicted_by is not None:
        before = Answers(engines["plain"], requests_of(Task("", task.predicted_by), tokenizer, tokens))
        before.read_prompts()
        before.answer()
        predicted = tuple(before.tokens[0])
    requests = requests_of(task, tokenizer, tokens, predicted=predicted)
    answers = {name: Answers(engine, requests) for name, engine in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    speculating = engines["speculating"]
    for _ in range(rounds):
        stats = speculating.stats
        for name, run in answers.items():
            run.read_prompts()
            times[name] += interleaved({name: run.answer}, num_rounds=1, warm_up=0, clock=clock)[name]
        assert answers["plain"].tokens == answers["speculating"].tokens, "speculation changed an answer"
    after = speculating.stats
    num_tokens = sum(len(answer) - 1 for answer in answers["plain"].tokens.values())
    return Line(
        task=task.name,
        weights=weights,
        num_tokens=num_tokens,
        plain_ms=median_ms(times["plain"]) / num_tokens,
        speculating_ms=median_ms(times["speculating"]) / num_tokens,
        speed_up=ratio(times["plain"], times["speculating"]),
        drafted=after.num_drafted_tokens - stats.num_drafted_tokens,
        accepted=after.num_accepted_tokens - stats.num_accepted_tokens,
    )


def engines_of(folder: Path, weights: str, *, threads: int, max_drafts: int) -> dict[str, Engine]:
    """Two engines around one model."""
    torch.set_num_threads(threads)
    model = load_model(folder, weights="int8" if weights == "int8" else None)
    config = EngineConfig(
        model_path=str(folder),
        device="cpu",
        weights_dtype=weights,
        num_threads=threads,
        state_memory_bytes=16 * model.state_spec.bytes_per_slot,
        max_num_slots=8,
        max_step_tokens=512,
        max_waiting=8,
    )
    return {
        "plain": build_engine(freeze(model), replace(config, max_drafts=0)),
        "speculating": build_engine(freeze(model), replace(config, max_drafts=max_drafts)),
    }


def table(lines: list[Line]) -> Table:
    shown = Table("task", "weights", "tokens", "ms a token", "speculating", "times", "drafted", "right")
    for line in lines:
        share = f"{line.accepted / line.drafted:.0%}" if line.drafted else "-"
        shown.add_row(
            line.task,
            line.weights,
            str(line.num_tokens),
            f"{line.plain_ms:.1f}",
            f"{line.speculating_ms:.1f}",
            f"{line.speed_up:.2f}",
            str(line.drafted),
            share,
        )
    return shown


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of the model.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    drafts: Annotated[int, typer.Option(min=1, max=64, help="Most drafts in a step.")] = DEFAULT_MAX_DRAFTS,
    clock: Annotated[str, typer.Option(help="wall, or cpu: this process alone (one thread, busy machine).")] = "wall",
    kinds: Annotated[str, typer.Option(help="float32, int8, or both with a comma.")] = "float32,int8",
) -> None:
    """Measures answers with and without speculation and writes them to benchmarks/results/."""
    if clock not in CLOCKS or (clock == "cpu" and threads != 1):
        raise typer.BadParameter("--clock is wall or cpu, and cpu needs --threads 1")
    folder = ensure_default_model(None) if model is None else model
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise typer.BadParameter("this model has no tokenizer", param_hint="--model")
    torch.set_num_threads(threads)
    machine = this_machine(clock)
    lines = []
    for weights in words(kinds, "--kinds", ("float32", "int8")):
        engines = engines_of(folder, weights, threads=threads, max_drafts=drafts)
        lines += [
            measure(task, engines, tokenizer, weights=weights, tokens=tokens, rounds=rounds, clock=clock)
            for task in TASKS
        ]
    console = Console(width=120)
    console.print(table(lines))
    result = {"model": folder.name, "clock": clock, "max_drafts": drafts, "lines": [asdict(line) for line in lines]}
    print(write_result("speculation", machine, result))


if __name__ == "__main__":
    typer.run(main)
