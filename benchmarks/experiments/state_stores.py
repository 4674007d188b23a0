"""What keeping a conversation costs: the embedded store and, with `--store`, the one in PostgreSQL.

    python -m benchmarks.experiments.state_stores --store postgresql://user@host/database

Times the store alone, without a model: files of the size of a state are written as the engine writes them, kept, used,
brought to a second replica, forked and deleted. The stores take turns. Ends with one JSON line.
"""

import asyncio
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import psycopg
import typer
from psycopg import sql
from rich.console import Console
from rich.table import Table

from benchmarks.machine import this_machine, write_result
from server.engine.state.snapshot_files import write_file
from server.states.embedded import open_embedded_store
from server.states.indexed import StoreOptions
from server.states.shared import SharedOptions, open_shared_store
from server.states.store import NewState, SnapshotRecord, StateRecord, StateStore, Turn

OPTIONS = StoreOptions(max_bytes=10 << 30)
OWNER = "bench"
Times = dict[str, list[float]]


async def one_round(first: StateStore, second: StateStore, content: bytes, times: Times) -> None:
    """One conversation's life; `second` is another replica, or the same store again."""
    begin = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begin
        now = time.perf_counter()
        times.setdefault(name, []).append(now - begin)
        begin = time.perf_counter()

    state = await _saved(first, content)
    lap("save")
    async with first.hold((await first.use(OWNER, state.id)).head):
        lap("use it again here")
    if second is not first:
        async with second.hold((await second.use(OWNER, state.id)).head):
            lap("use it at another replica")
    fork = await first.fork(OWNER, state.id, point=None, name=None, ttl_s=None)
    lap("fork")
    await first.delete(OWNER, fork.id)
    begin = time.perf_counter()
    await first.delete(OWNER, state.id)
    lap("delete")


async def _saved(store: StateStore, content: bytes) -> StateRecord:
    async with store.room(1, bytes_each=len(content), owner=OWNER) as room:
        await asyncio.to_thread(write_file, room.path(0), [content])
        head = SnapshotRecord(room.files[0], 100, (7,), 7, Turn.OPEN, len(content), "bench")
        return await store.add(NewState(OWNER, head))


@asynccontextmanager
async def stores(folder: Path, url: str | None) -> AsyncIterator[dict[str, tuple[StateStore, StateStore]]]:
    """Pairs of replicas, in places of their own that are gone afterwards."""
    embedded = open_embedded_store(folder / "embedded", OPTIONS)
    opened: dict[str, tuple[StateStore, StateStore]] = {"embedded": (embedded, embedded)}
    schema = f"bench_{secrets.token_hex(8)}"
    if url is not None:
        shared = SharedOptions(url, schema=schema)
        one, two = (open_shared_store(folder / "shared", shared, OPTIONS) for _ in range(2))
        opened["shared"] = (one, two)
    try:
        yield opened
    finally:
        for store in {id(store): store for pair in opened.values() for store in pair}.values():
            await store.close()
        if url is not None:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))


async def measure(url: str | None, sizes: list[int], rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Median milliseconds by store and size, and by step."""
    found: dict[str, dict[str, float]] = {}
    async with stores(folder, url) as opened:
        for size in sizes:
            content = os.urandom(size)
            times: dict[str, Times] = {name: {} for name in opened}
            for number in range(rounds + 1):
                for name, (first, second) in opened.items():
                    # The first round is for warming up.
                    await one_round(first, second, content, times[name] if number else {})
            for name, steps in times.items():
                medians = {step: statistics.median(laps) * 1e3 for step, laps in steps.items()}
                found[f"{name}, {size / 1e6:.1f} MB"] = medians
    return found


def main(
    store: Annotated[str | None, typer.Option(help="postgresql://... to compare with.")] = None,
    sizes: Annotated[str, typer.Option(help="Bytes of a state, separated by commas.")] = "4300000,70000000",
    rounds: Annotated[int, typer.Option(min=1)] = 10,
) -> None:
    """See the module."""
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(store, [int(size) for size in sizes.split(",")], rounds, Path(folder)))
    steps = list(dict.fromkeys(step for medians in found.values() for step in medians))
    table = Table("milliseconds", *steps)
    for name, medians in found.items():
        table.add_row(name, *(f"{medians[step]:.1f}" if step in medians else "-" for step in steps))
    Console().print(table)
    print(write_result("state-stores", this_machine(), {"num_rounds": rounds, "median_ms": found}))


if __name__ == "__main__":
    typer.run(main)
