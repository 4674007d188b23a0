"""What splitting a model over processes costs or gains: the same engine with 1, 2, ... ranks, side by side.

    python -m benchmarks.experiments.ranks MODEL --ranks 1,2 --threads 2 [--device cuda --dtype bfloat16]

All engines get the same threads in all and take turns. Ends with one JSON line.
"""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import this_machine, write_result
from server.engine.types.requests import EngineConfig, GenerationRequest, SamplingParams
from server.engine_client.client import EngineClient

PROMPT_TOKENS = 256
STATE_MEMORY_BYTES = 1 << 30


@asynccontextmanager
async def running(config: EngineConfig) -> AsyncIterator[EngineClient]:
    """A ready engine."""
    client = EngineClient(config)
    await client.start()
    try:
        await client.wait_ready()
        yield client
    finally:
        await client.close()


async def answer(client: EngineClient, name: str, num_tokens: int) -> list[float]:
    """When each token came, seconds from the request on."""
    prompt = tuple(1 + (7 * i + len(name)) % 200 for i in range(PROMPT_TOKENS))
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    begin, times = time.perf_counter(), []
    async with client.submit(GenerationRequest(name, prompt, sampling)) as stream:
        async for event in stream:
            times += [time.perf_counter() - begin] * len(event.token_ids)
    return times


async def one_round(client: EngineClient, rows: int, num_tokens: int) -> tuple[float, list[float]]:
    """Milliseconds to the last of the first tokens, and between the tokens that follow."""
    answers = await asyncio.gather(*(answer(client, f"{rows}-{row}", num_tokens) for row in range(rows)))
    first = max(times[0] for times in answers)
    steps = [later - sooner for times in answers for sooner, later in pairwise(times[1:])]
    return 1e3 * first, [1e3 * step for step in steps]


async def measure(
    base: EngineConfig, degrees: list[int], rows: list[int], *, rounds: int, num_tokens: int
) -> dict[str, dict[str, float]]:
    """Medians by ranks and rows."""
    firsts: dict[str, list[float]] = {}
    steps: dict[str, list[float]] = {}
    async with AsyncExitStack() as stack:
        clients = {}
        for degree in degrees:
            config = replace(base, tensor_parallel=degree)
            clients[degree] = await stack.enter_async_context(running(config))
        for number in range(rounds + 1):
            for batch in rows:
                for degree, client in clients.items():
                    first, between = await one_round(client, batch, num_tokens)
                    if number:  # the first round is for warming up
                        name = f"{degree} ranks, {batch} rows"
                        firsts.setdefault(name, []).append(first)
                        steps.setdefault(name, []).extend(between)
    return {
        name: {
            "step_ms": statistics.median(steps[name]),
            "best_step_ms": min(steps[name]),
            f"first_token_after_{PROMPT_TOKENS}_ms": statistics.median(firsts[name]),
        }
        for name in steps
    }


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a model.")],
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, separated by commas.")] = "1,2",
    rows: Annotated[str, typer.Option(help="Conversations at once, separated by commas.")] = "1,8",
    threads: Annotated[int, typer.Option(min=1, help="Of each engine, all its ranks together.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="As for dijiang serve.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    tokens: Annotated[int, typer.Option(min=3, help="Of each answer.")] = 16,
) -> None:
    """See the module."""
    degrees, batches = ([int(part) for part in text.split(",")] for text in (ranks, rows))
    config = EngineConfig(
        model_path=str(model),
        device=device,
        weights_dtype=dtype,
        num_threads=threads,
        state_memory_bytes=STATE_MEMORY_BYTES,
        max_num_slots=max(batches),
        max_step_tokens=512,
        max_waiting=0,
        max_drafts=0,
    )
    found = asyncio.run(measure(config, degrees, batches, rounds=rounds, num_tokens=tokens))
    columns = list(next(iter(found.values())))
    table = Table("", *columns)
    for name, medians in found.items():
        table.add_row(name, *(f"{medians[column]:.1f}" for column in columns))
    Console().print(table)
    settings = {"model": model.name, "dtype": dtype, "threads": threads, "num_rounds": rounds}
    machine = this_machine(device="cuda" if device.startswith("cuda") else "cpu")
    print(write_result("ranks", machine, settings | {"ranks": found}))


if __name__ == "__main__":
    typer.run(main)
