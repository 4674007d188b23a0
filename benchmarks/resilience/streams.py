"""A thousand streams at once: none may fail, and none may be silent for longer than the keep-alive.

    dijiang bench streams
    dijiang bench streams --streams 1000 --tokens 32 --keepalive 15

A server of our own. All clients ask at once; those that have no slot yet wait, and hear a comment now and then. The
clients are bare sockets, so that the machine's time is the server's.
"""

import asyncio
import json
import os
import statistics
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import httpx
import typer

from benchmarks.own_server import ServerStartError, served_folder, serving

PATIENCE_S = 600.0
"""Without a byte for so long, a stream has failed."""
PROMPT_TOKENS = 16
SLACK = 1.5
"""A silence of up to so many keep-alives is taken for the machine's, which wakes server and clients late."""


@dataclass(slots=True)
class StreamResult:
    """One stream.

    Attributes:
        outcome: `whole`, or what went wrong.
        num_tokens: that came.
        num_comments: that came instead while there was nothing.
        silence_s: the longest time without a byte, from the request on.
        first_s: until the first token.
    """

    outcome: str = "cut off"
    num_tokens: int = 0
    num_comments: int = 0
    silence_s: float = 0.0
    first_s: float = 0.0


async def stream(host: str, port: int, body: bytes, num_tokens: int) -> StreamResult:
    """One client's request, to its end."""
    result = StreamResult()
    begin = last = time.monotonic()
    writer = None
    try:
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection(host, port)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        while True:
            async with asyncio.timeout(PATIENCE_S):
                line = await reader.readline()
            now = time.monotonic()
            result.silence_s, last = max(result.silence_s, now - last), now
            if line.startswith(b"HTTP/1.1") and b" 200 " not in line:
                result.outcome = line.decode(errors="replace").strip()
                return result
            if line.startswith(b"data: {"):
                if b'"error"' in line:
                    result.outcome = "error"
                    return result
                result.num_tokens += len(json.loads(line[6:])["choices"][0].get("token_ids") or [])
                result.first_s = result.first_s or now - begin
            elif line.startswith(b":"):
                result.num_comments += 1
            elif line.startswith(b"data: [DONE]"):
                result.outcome = "whole" if result.num_tokens == num_tokens else f"{result.num_tokens} tokens"
                return result
            elif not line:
                return result
    except TimeoutError:
        result.outcome = "silent"
    except OSError as error:
        result.outcome = type(error).__name__
    finally:
        if writer is not None:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
    return result


async def all_at_once(base_url: str, num_streams: int, num_tokens: int) -> list[StreamResult]:
    """So many streams, begun together."""
    url = httpx.URL(base_url)
    fields = {"max_tokens": num_tokens, "stream": True, "ignore_eos": True, "temperature": 0, "return_token_ids": True}

    def body(number: int) -> bytes:
        prompt = [1 + (number * 7 + place * 3) % 90 for place in range(PROMPT_TOKENS)]
        return json.dumps({"prompt": prompt, **fields}).encode()

    assert url.port is not None
    port = url.port
    return await asyncio.gather(*(stream(url.host, port, body(number), num_tokens) for number in range(num_streams)))


@dataclass(frozen=True, slots=True)
class StreamsReport:
    """What became of all of them.

    Attributes:
        outcomes: how many ended how.
        seconds: that it took.
        silence_s: the longest of any.
        first_s: median and longest time to a first token.
        num_comments: keep-alives that came.
    """

    outcomes: dict[str, int]
    num_tokens: int
    seconds: float
    silence_s: float
    first_s: tuple[float, float]
    num_comments: int

    @classmethod
    def of(cls, results: list[StreamResult], seconds: float) -> "StreamsReport":
        firsts = [one.first_s for one in results if one.first_s > 0] or [0.0]
        return cls(
            outcomes=dict(Counter(one.outcome for one in results)),
            num_tokens=sum(one.num_tokens for one in results),
            seconds=round(seconds, 2),
            silence_s=round(max(one.silence_s for one in results), 2),
            first_s=(round(statistics.median(firsts), 2), round(max(firsts), 2)),
            num_comments=sum(one.num_comments for one in results),
        )

    @property
    def has_failed(self) -> bool:
        """Whether any stream did not end as it must."""
        return self.outcomes.keys() != {"whole"}


def streams_command(
    model: Annotated[Path | None, typer.Argument(help="Folder of a model; the default model if absent.")] = None,
    streams: Annotated[int, typer.Option(min=1, help="At once.")] = 1000,
    tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 32,
    keepalive: Annotated[float, typer.Option(min=0.1, help="--keepalive-s of the server.")] = 15.0,
    threads: Annotated[str, typer.Option(help="CPU threads of the server.")] = "auto",
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep the JSON there.")] = None,
) -> None:
    """Many streams at once; fails if one of them fails, or is silent for longer than the keep-alive."""
    folder = served_folder(model)
    try:
        with serving(folder, "--threads", threads, "--keepalive-s", str(keepalive)) as base_url:
            begin = time.monotonic()
            results = asyncio.run(all_at_once(base_url, streams, tokens))
            report = StreamsReport.of(results, time.monotonic() - begin)
    except ServerStartError as error:
        raise typer.BadParameter(str(error)) from error
    document = {"streams": asdict(report), "keepalive_s": keepalive, "load_average": os.getloadavg()}
    if save is not None:
        save.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{report.outcomes}; longest silence {report.silence_s} s of {keepalive:g} s, {report.num_comments} comments")
    print(json.dumps(document))
    if report.has_failed or report.silence_s > SLACK * keepalive:
        raise typer.Exit(1)
