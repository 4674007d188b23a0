"""Answers to a question sent without any sampling: how many are right and end by themselves."""

import asyncio
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console

from benchmarks.own_server import ServerStartError, served_folder, serving

AT_ONCE = 8
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Answers:
    """Of one question.

    Attributes:
        num_good: right, and ended by themselves.
        bad: the texts of the others.
    """

    num_seeds: int
    num_good: int
    bad: tuple[str, ...]


async def ask(base_url: str, question: str, answer: str, *, num_seeds: int, max_tokens: int) -> Answers:
    """Asks with the seeds 0 .. num_seeds - 1; of sampling a request names nothing else."""
    at_once = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=base_url, timeout=TIMEOUT_S) as client:

        async def one(seed: int) -> tuple[bool, str]:
            body = {"messages": [{"role": "user", "content": question}], "max_tokens": max_tokens, "seed": seed}
            async with at_once:
                response = await client.post("/v1/chat/completions", json=body)
            response.raise_for_status()
            choice = response.json()["choices"][0]
            text: str = choice["message"]["content"]
            return choice["finish_reason"] == "stop" and answer in text, text

        found = await asyncio.gather(*(one(seed) for seed in range(num_seeds)))
    bad = tuple(text for is_good, text in found if not is_good)
    return Answers(num_seeds=num_seeds, num_good=num_seeds - len(bad), bad=bad)


def answers_command(
    model: Annotated[Path | None, typer.Argument(help="Folder of a model; the default model if absent.")] = None,
    question: Annotated[str, typer.Option(help="Asked with every seed.")] = "What is the capital of France?",
    answer: Annotated[str, typer.Option(help="A right answer has this text.")] = "Paris",
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 50,
    max_tokens: Annotated[int, typer.Option(min=1, help="By then an answer has to end by itself.")] = 60,
    default_sampling: Annotated[str, typer.Option(help="As of `dijiang serve`.")] = "model",
) -> None:
    """Asks a question without any field of sampling, once for each seed; prints how many answers are right and end."""
    try:
        folder = served_folder(model)
        with serving(folder, "--default-sampling", default_sampling) as base_url:
            found = asyncio.run(ask(base_url, question, answer, num_seeds=seeds, max_tokens=max_tokens))
    except ServerStartError as error:
        raise typer.BadParameter(str(error)) from error
    console = Console(highlight=False, markup=False)
    for text in found.bad:
        console.print(f"not so: {text!r}")
    console.print(f"{found.num_good} of {found.num_seeds} say {answer!r} and end within {max_tokens} tokens")
    print(json.dumps({"answers": asdict(found)}))
