"""One long request over HTTP: does the time per token stay flat, and the server's memory?

    python benchmarks/experiments/long_run.py --tokens 20000

Streams one completion with `ignore_eos` from a running server, prints time per token and the memory of
the server's processes by position, and ends with one JSON line. A softmax transformer with a cache gets
slower and larger with each token; a constant state does neither.
"""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Annotated

import httpx
import psutil
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from clients.client import DEFAULT_BASE_URL, Client
from clients.errors import ClientError

PROMPT = "Once upon a time"


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tokens at neighbouring positions.

    Attributes:
        first: position of the first one in the answer, from 0.
        num_tokens: how many.
        mean_ms: wall time per token.
        median_ms: median of the time between two pieces of the stream, per token of the piece.
        memory_mib: resident memory of the server and its children at the end of the bucket; None if the
            server does not run on this machine.
    """

    first: int
    num_tokens: int
    mean_ms: float
    median_ms: float
    memory_mib: float | None


class MemoryMeter:
    """Resident memory of the process that listens at an address, and of its children."""

    def __init__(self, url: str) -> None:
        address = httpx.URL(url)
        is_local = address.host in ("127.0.0.1", "localhost", "::1")
        self._process = _listener(address.port if address.port is not None else 80) if is_local else None

    def read_mib(self) -> float | None:
        if self._process is None:
            return None
        processes = [self._process, *self._process.children(recursive=True)]
        return sum(process.memory_info().rss for process in processes) / 2**20


def main(
    base_url: Annotated[str, typer.Option(envvar="DIJIANG_BASE_URL")] = DEFAULT_BASE_URL,
    tokens: Annotated[int, typer.Option(min=100)] = 20_000,
    buckets: Annotated[int, typer.Option(min=2, max=50)] = 10,
    model: str | None = None,
) -> None:
    """Stream one long completion and report time per token and memory by position."""
    console = Console()
    try:
        name, rows = run(base_url, model, tokens, tokens // buckets, console)
    except ClientError as error:
        Console(stderr=True).print(f"error: {error}", markup=False)
        raise typer.Exit(1) from error
    console.print(table(rows))
    print(json.dumps(summary(name, rows)))
    if sum(row.num_tokens for row in rows) != tokens:
        raise typer.Exit(1)


def run(
    base_url: str, model: str | None, tokens: int, bucket_tokens: int, console: Console
) -> tuple[str, list[Bucket]]:
    """The measurement with a progress bar; returns the model's name and the buckets."""
    meter = MemoryMeter(base_url)
    rows = []
    with Client(base_url) as client, Progress(console=console, transient=True) as progress:
        name = model if model is not None else client.models()[0].id
        task = progress.add_task(f"{name}: {tokens:,} tokens", total=tokens)
        for row in measure(client, name, tokens, bucket_tokens, meter):
            rows.append(row)
            progress.update(task, completed=row.first + row.num_tokens)
    return name, rows


def measure(client: Client, model: str, tokens: int, bucket_tokens: int, meter: MemoryMeter) -> Iterator[Bucket]:
    """Streams the request; yields each bucket as it is full. The prompt's own time is not in it."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    first, seen, times = 0, 0, list[float]()
    start_s = last_s = time.perf_counter()
    with client.stream_complete(
        PROMPT, model=model, max_tokens=tokens, ignore_eos=True, temperature=1.0, seed=0, stream_options=options
    ) as stream:
        for chunk in stream:
            now_s = time.perf_counter()
            count = chunk.usage.completion_tokens if chunk.usage is not None else seen
            if count == seen:
                continue
            if seen == 0:
                start_s = now_s  # the time of the first token belongs to the prompt
            else:
                times += [(now_s - last_s) / (count - seen)] * (count - seen)
            seen, last_s = count, now_s
            if seen - first >= bucket_tokens or seen == tokens:
                mean_s = (now_s - start_s) / len(times)
                yield Bucket(first, seen - first, 1e3 * mean_s, 1e3 * statistics.median(times), meter.read_mib())
                first, start_s, times = seen, now_s, []


def table(rows: list[Bucket]) -> Table:
    """The buckets for the eye."""
    result = Table("positions", "tokens", "mean ms/token", "median ms/token", "server memory MiB")
    for row in rows:
        memory = "-" if row.memory_mib is None else f"{row.memory_mib:,.1f}"
        last = row.first + row.num_tokens - 1
        result.add_row(
            f"{row.first:,}-{last:,}", f"{row.num_tokens:,}", f"{row.mean_ms:.2f}", f"{row.median_ms:.2f}", memory
        )
    return result


def summary(model: str, rows: list[Bucket]) -> dict[str, object]:
    """The same for a machine: the last bucket against the first, and everything in between."""
    first, last = rows[0], rows[-1]
    growth = None if first.memory_mib is None or last.memory_mib is None else last.memory_mib - first.memory_mib
    return {
        "benchmark": "long_run",
        "model": model,
        "tokens": last.first + last.num_tokens,
        "median_ms_last_over_first": last.median_ms / first.median_ms,
        "memory_growth_mib": growth,
        "buckets": [asdict(row) for row in rows],
    }


def _listener(port: int) -> psutil.Process | None:
    """The process behind a listening port; None if this user may not know."""
    with suppress(psutil.AccessDenied):
        for connection in psutil.net_connections("tcp"):
            is_it = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if is_it and connection.pid is not None:
                return psutil.Process(connection.pid)
    return None


if __name__ == "__main__":
    typer.run(main)
