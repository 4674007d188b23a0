"""Likelihood far into a text, beside the same tokens read from nearby: what distance alone costs."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.own_server import ServerStartError, served_folder, serving
from benchmarks.report import failed, numbers
from clients.client import Client
from clients.errors import ClientError
from clients.scoring import token_logprobs
from dijiang_model.errors import ModelError

NAME = "measured"
TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Distance:
    """A span of one text.

    Attributes:
        file: its name.
        end: tokens of the text up to the span's end.
        far: nats per token of the span, the text read from its beginning.
        near: the same, read from one span before it.
    """

    file: str
    end: int
    far: float
    near: float


def distances(client: Client, file: Path, ends: list[int], *, span: int) -> list[Distance]:
    """Measures spans of a text.

    Args:
        ends: of the spans, in tokens of the text; those beyond its end are left out.
        span: tokens of each.

    Raises:
        ClientError: the server does not answer so.
    """
    ends = [end for end in ends if end >= 2 * span]
    tokens = client.tokenize(file.read_text(encoding="utf-8"))
    ends = [end for end in ends if end <= len(tokens)]
    if not ends:
        return []
    far = _losses(client, tokens[: max(ends)])
    found = []
    for end in ends:
        near = _losses(client, tokens[end - 2 * span : end])
        found.append(Distance(file.name, end, fmean(far[end - span : end]), fmean(near[span:])))
    return found


def _losses(client: Client, tokens: tuple[int, ...]) -> list[float]:
    """Nats of each token; 0 for the first, which nothing foretells."""
    return [0.0 if value is None else -value for _, value in token_logprobs(client, tokens)]


def distance_command(
    texts: Annotated[list[Path], typer.Argument(help="UTF-8 texts, long ones that the model was not chosen on.")],
    model: Annotated[Path | None, typer.Option(help="Folder of a model; the default model if absent.")] = None,
    ends: Annotated[
        str, typer.Option(help="Where the spans end, in tokens; those beyond a text's end are left out.")
    ] = "4096,8192,16384,32768,65536",
    span: Annotated[int, typer.Option(min=2, help="Tokens of a span, and what is read before it from nearby.")] = 2048,
) -> None:
    """Compares the likelihood of tokens far into a text with that of the same tokens read from nearby."""
    wanted = numbers(ends, "--ends")
    try:
        folder = served_folder(model)
        with (
            serving(folder, "--served-model-name", NAME) as base_url,
            Client(base_url, model=NAME, timeout=TIMEOUT_S) as client,
        ):
            found = [row for text in texts for row in distances(client, text, wanted, span=span)]
    except (ClientError, ModelError, OSError, ServerStartError, UnicodeDecodeError) as error:
        raise failed(error) from error
    if not found:
        raise failed(f"no text is as long as a span and what is read before it: {2 * span} tokens")
    table = Table("text", "tokens", "nats per token", "read from nearby", "difference")
    for row in found:
        table.add_row(row.file, f"{row.end:,}", f"{row.far:.3f}", f"{row.near:.3f}", f"{row.far - row.near:+.3f}")
    Console(highlight=False).print(table)
    print(json.dumps({"distance": {"span": span, "rows": [asdict(row) for row in found]}}))
