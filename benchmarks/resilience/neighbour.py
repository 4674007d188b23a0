"""What one client notices of another: B's first token, its token gaps and `/health`, alone and while A does its worst.

    dijiang bench neighbour
    dijiang bench neighbour --rows long-prompt,slots --seconds 20

A server of our own with two keys. Each row is one thing that A does with its key, from a single long prompt to bodies
made to be slow; B asks for short answers one after the other meanwhile, and `/health` is polled. The target is a
first token within twice B's own value and one step, gaps below four times B's own or 150 ms, whichever is larger, and
`/health` within 0.5 s.
"""

import asyncio
import json
import os
import secrets
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.own_server import ServerStartError, served_folder, serving

ALONE = "alone"
ANSWER_TOKENS = 16
WIDTH = 140
HEALTH_EVERY_S = 0.05
GAP_TARGET_S, GAP_RATIO, HEALTH_TARGET_S, FIRST_RATIO = 0.15, 4.0, 0.5, 2.0


@dataclass(slots=True)
class Noticed:
    """What B saw, seconds.

    Attributes:
        firsts: until the first token of each answer.
        gaps: between tokens.
        health: until `/health` had answered.
        refused: answers that were none, by status.
    """

    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    refused: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Side:
    """One client of the server."""

    base_url: str
    key: str

    def http(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(base_url=self.base_url, headers=headers, timeout=600, trust_env=False, limits=limits)


async def watch(side: Side, seconds: float) -> Noticed:
    """B asks, one answer after the other, for so long, and once at least."""
    noticed, ends = Noticed(), time.perf_counter() + seconds
    polling = asyncio.create_task(_poll(side, noticed))
    try:
        async with side.http() as http:
            while True:
                await _ask(http, noticed)
                if time.perf_counter() >= ends:
                    return noticed
    finally:
        polling.cancel()


async def _ask(http: httpx.AsyncClient, noticed: Noticed) -> None:
    body = _completion(prompt=[1 + secrets.randbelow(99) for _ in range(16)], max_tokens=ANSWER_TOKENS)
    last = time.perf_counter()
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            noticed.refused[response.status_code] = noticed.refused.get(response.status_code, 0) + 1
            await asyncio.sleep(HEALTH_EVERY_S)
            return
        is_first = True
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                now = time.perf_counter()
                (noticed.firsts if is_first else noticed.gaps).append(now - last)
                last, is_first = now, False


async def _poll(side: Side, noticed: Noticed) -> None:
    async with side.http() as http:
        while True:
            begin = time.perf_counter()
            await http.get("/health")
            noticed.health.append(time.perf_counter() - begin)
            await asyncio.sleep(HEALTH_EVERY_S)


def _completion(**fields: Any) -> dict[str, Any]:
    return {"stream": True, "ignore_eos": True, "temperature": 0, "return_token_ids": True, **fields}


# What A does. Each of these goes on until it is cancelled.


async def long_prompt(http: httpx.AsyncClient) -> None:
    """One prompt of 20,000 tokens after the other."""
    while True:
        await _drain(http, _completion(prompt=_tokens(20_000), max_tokens=1))


async def slots(http: httpx.AsyncClient) -> None:
    """40 streams without end."""
    await asyncio.gather(*(_drain(http, _completion(prompt=_tokens(8), max_tokens=60_000)) for _ in range(40)))


async def queue(http: httpx.AsyncClient) -> None:
    """200 clients that ask again and again."""

    async def loop() -> None:
        while True:
            await _drain(http, _completion(prompt=_tokens(64), max_tokens=32))

    await asyncio.gather(*(loop() for _ in range(200)))


async def choices(http: httpx.AsyncClient) -> None:
    """16 answers to one prompt of 50,000 tokens."""
    while True:
        await _drain(http, _completion(prompt=_tokens(50_000), max_tokens=1, n=16))


async def grammars(http: httpx.AsyncClient) -> None:
    """Four schemas at a time that take as long as one may."""

    async def loop() -> None:
        while True:
            properties = {f"{secrets.token_hex(4)}{number}": {"type": "string"} for number in range(4_000)}
            schema = {"type": "object", "properties": properties, "required": list(properties)}
            body = _completion(prompt="x", max_tokens=1, structured_outputs={"json": schema})
            await _drain(http, body)

    await asyncio.gather(*(loop() for _ in range(4)))


async def digits(http: httpx.AsyncClient) -> None:
    """A megabyte of digits to be tokenized."""
    while True:
        await http.post("/tokenize", json={"prompt": "1" * 1_000_000})


async def lists(http: httpx.AsyncClient) -> None:
    """Bodies of many small items."""
    body = b'{"input":"a","tools":[' + b",".join([b"1"] * 300_000) + b"]}"
    while True:
        await http.post("/v1/responses", content=body, headers={"content-type": "application/json"})


async def idle_bodies(http: httpx.AsyncClient) -> None:
    """40 connections that send most of a body of 8 MB and no more."""
    host, port = http.base_url.host, http.base_url.port
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"{'authorization: ' + http.headers['authorization']}\r\ncontent-length: {8 << 20}\r\n\r\n"
    ).encode()
    writers = []
    try:
        while True:
            for _ in range(40):
                _, writer = await asyncio.open_connection(host, port)
                writers.append(writer)
                writer.write(head + b" " * (7 << 20))
            await asyncio.sleep(30)
    finally:
        for writer in writers:
            writer.close()


ROWS: dict[str, Callable[[httpx.AsyncClient], Awaitable[None]]] = {
    "long-prompt": long_prompt,
    "slots": slots,
    "queue": queue,
    "choices": choices,
    "grammars": grammars,
    "digits": digits,
    "lists": lists,
    "idle-bodies": idle_bodies,
}


def _tokens(num: int) -> list[int]:
    begin = secrets.randbelow(1_000)
    return [1 + (begin + index * 7) % 97 for index in range(num)]


async def _drain(http: httpx.AsyncClient, body: dict[str, Any]) -> None:
    """Reads an answer to its end; a refusal is taken note of by waiting."""
    async with http.stream("POST", "/v1/completions", json=body) as response:
        async for _ in response.aiter_bytes():
            pass
    if response.status_code != 200:
        await asyncio.sleep(HEALTH_EVERY_S)


@asynccontextmanager
async def beside(side: Side, row: Callable[[httpx.AsyncClient], Awaitable[None]]) -> AsyncIterator[None]:
    """A does this while the context is open."""
    async with side.http() as http:
        work = asyncio.ensure_future(row(http))
        try:
            yield
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError, httpx.HTTPError, OSError):
                await work


@dataclass(frozen=True, slots=True)
class Row:
    """Medians and worst values of one row, ms."""

    name: str
    first_ms: float
    worst_first_ms: float
    gap_ms: float
    worst_gap_ms: float
    worst_health_ms: float
    num_answers: int
    refused: dict[int, int]

    @classmethod
    def of(cls, name: str, noticed: Noticed) -> "Row":
        firsts, gaps = noticed.firsts, noticed.gaps
        return cls(
            name,
            first_ms=_median_ms(firsts),
            worst_first_ms=_worst_ms(firsts),
            gap_ms=_median_ms(gaps),
            worst_gap_ms=_worst_ms(gaps),
            worst_health_ms=_worst_ms(noticed.health),
            num_answers=len(firsts),
            refused=noticed.refused,
        )

    def problems(self, alone: "Row") -> list[str]:
        """Which targets it misses."""
        step_ms = max(alone.worst_gap_ms, 1e3 * GAP_TARGET_S)
        checks = {
            "first token": self.first_ms <= FIRST_RATIO * alone.first_ms + step_ms,
            "gaps": self.gap_ms <= max(GAP_RATIO * alone.gap_ms, 1e3 * GAP_TARGET_S),
            "/health": self.worst_health_ms <= 1e3 * HEALTH_TARGET_S,
            "refused": not self.refused,
        }
        return [name for name, is_good in checks.items() if not is_good]


def _median_ms(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds) if seconds else float("nan")


def _worst_ms(seconds: list[float]) -> float:
    return 1e3 * max(seconds, default=float("nan"))


async def measure(base_url: str, keys: tuple[str, str], names: list[str], seconds: float) -> list[Row]:
    """Every row, and B alone before and after each, since the machine may be another one a minute later."""
    a, b = (Side(base_url, key) for key in keys)
    await watch(b, 1.0)
    rows = [Row.of(ALONE, await watch(b, seconds))]
    for name in names:
        async with beside(a, ROWS[name]):
            await asyncio.sleep(min(3.0, seconds / 2))
            rows.append(Row.of(name, await watch(b, seconds)))
        await watch(b, 1.0)
        rows.append(Row.of(ALONE, await watch(b, seconds)))
    return rows


def judged(rows: list[Row]) -> dict[str, list[str]]:
    """What each row misses, beside B alone before and after it, the slower of the two."""
    found = {}
    for before, row, after in zip(rows[::2], rows[1::2], rows[2::2], strict=False):
        alone = replace(
            before,
            first_ms=max(before.first_ms, after.first_ms),
            gap_ms=max(before.gap_ms, after.gap_ms),
            worst_gap_ms=max(before.worst_gap_ms, after.worst_gap_ms),
        )
        found[row.name] = row.problems(alone)
    return found


def neighbour_command(
    model: Annotated[Path | None, typer.Argument(help="Folder of a model; the default model if absent.")] = None,
    rows: Annotated[str, typer.Option(help="What A does, separated by commas; all of it unless said.")] = ",".join(
        ROWS
    ),
    seconds: Annotated[float, typer.Option(help="Of each row.")] = 20.0,
    threads: Annotated[str, typer.Option(help="CPU threads of the server.")] = "auto",
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep the JSON there.")] = None,
) -> None:
    """What one client notices of another, by what that one does."""
    names = [name.strip() for name in rows.split(",") if name.strip()]
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: there are {', '.join(ROWS)}")
    keys = (f"sk-{secrets.token_hex(8)}", f"sk-{secrets.token_hex(8)}")
    options = ("--threads", threads, "--api-keys", ",".join(keys), "--max-conversations", "32")
    try:
        with serving(served_folder(model), *options) as base_url:
            found = asyncio.run(measure(base_url, keys, names, seconds))
    except ServerStartError as error:
        raise typer.BadParameter(str(error)) from error
    table = Table("A", "first token, ms", "worst", "gap, ms", "worst", "worst /health, ms", "answers", "misses")
    misses_of = judged(found)
    for row in found:
        misses = ", ".join(misses_of.get(row.name, []))
        numbers = (row.first_ms, row.worst_first_ms, row.gap_ms, row.worst_gap_ms, row.worst_health_ms)
        table.add_row(row.name, *(f"{number:,.1f}" for number in numbers), str(row.num_answers), misses)
    told = Console(width=WIDTH)
    told.print(table)
    document = {"neighbour": [asdict(row) for row in found], "misses": misses_of, "load_average": os.getloadavg()}
    if save is not None:
        save.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
