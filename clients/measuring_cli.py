"""The commands `dijiang score` and `dijiang selfcheck`."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from clients.calls import Call
from clients.cli import ApiKey, BaseUrl, ModelName, connected
from clients.client import DEFAULT_BASE_URL
from clients.scoring import Score, score
from clients.types import SelfCheckReport

DEFAULT_TOLERANCE = 0.01
PIPE = Path("-")


def score_command(
    files: Annotated[list[Path], typer.Argument(help="UTF-8 texts of any length; - is standard input.")],
    base_url: BaseUrl = DEFAULT_BASE_URL,
    api_key: ApiKey = None,
    model: ModelName = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON for each text.")] = False,
) -> None:
    """Say how likely a model finds texts: perplexity, and bits per byte."""
    notices = Console(stderr=True)
    texts = [(file, _read(file, notices)) for file in files]
    table = Table("text", "tokens", "log-probability", "perplexity", "bits per byte")
    with connected(base_url, api_key, model, notices) as (client, name):
        for file, text in texts:
            with _waiting(f"{name} reads {file}", notices):
                result = score(client, text, model=name)
            if as_json:
                typer.echo(json.dumps(_as_json(file, result)))
            else:
                table.add_row(
                    str(file),
                    f"{result.num_tokens:,}",
                    f"{result.log_probability:.3f}",
                    f"{result.perplexity:.4g}",
                    f"{result.bits_per_byte:.4g}",
                )
    if not as_json:
        Console(width=None if sys.stdout.isatty() else 200).print(table)


def selfcheck_command(
    base_url: Annotated[str, typer.Argument(help="Address of the server, with or without /v1.")] = DEFAULT_BASE_URL,
    api_key: ApiKey = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest difference of log-probabilities that is still right.")
    ] = DEFAULT_TOLERANCE,
) -> None:
    """Measure on a running server that decoding, reading in any chunks, caching and batching change no answer.

    The server does it itself, `POST /admin/selfcheck`: `--api-key` is one of its `--admin-keys`.
    """
    notices = Console(stderr=True)
    check = Call("POST", "/admin/selfcheck", SelfCheckReport.model_validate, {"tolerance": tolerance}, retry=False)
    with connected(base_url, api_key, "", notices) as (client, _), _waiting("the server checks itself", notices):
        report = client.answer(check)
    table = Table("compared with a prompt read at once, by itself", "values", "largest difference")
    for finding in report.findings:
        shown = f"{finding.largest_difference:.2e}" if finding.num_values else "not possible here"
        table.add_row(finding.name, str(finding.num_values), shown)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    typer.echo(f"largest difference: {report.largest_difference:.2e}")
    if not report.passed:
        notices.print(f"error: that is more than {tolerance:g}", style="red", highlight=False)
        raise typer.Exit(1)


@contextmanager
def _waiting(text: str, notices: Console) -> Iterator[None]:
    """At a terminal: says what is waited for, and for how long."""
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=notices, transient=True, disable=not notices.is_terminal) as progress:
        progress.add_task(text, total=None)
        yield


def _read(file: Path, notices: Console) -> str:
    try:
        content = sys.stdin.buffer.read() if file == PIPE else file.read_bytes()
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"byte {error.start:,} is not UTF-8"
        notices.print(f"error: cannot read {file}: {reason}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    if not text:
        notices.print(f"error: {file} is empty", style="red", markup=False, highlight=False)
        raise typer.Exit(1)
    return text


def _as_json(file: Path, result: Score) -> dict[str, object]:
    numbers = {
        "num_tokens": result.num_tokens,
        "num_scored": result.num_scored,
        "log_probability": result.log_probability,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
    }
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return {"text": str(file), **finite}
