"""`dijiang state`: saved conversations at the command line."""

import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from clients.cli import ApiKey, BaseUrl, connected
from clients.client import DEFAULT_BASE_URL, Client
from clients.states import ID_PREFIX, State, States

NO_MODEL = "-"
"""States belong to the server's model; none is asked for."""
Reference = Annotated[str, typer.Argument(help="Id or name of the state.")]
Name = Annotated[str | None, typer.Option(help="Name of the new state.")]
Point = Annotated[str | None, typer.Option(help="Begin at this named point instead of the end.")]
app = typer.Typer(
    help="Saved conversations: list, inspect, move, branch.", add_completion=False, pretty_exceptions_enable=False
)


@app.command("list")
def list_command(base_url: BaseUrl = DEFAULT_BASE_URL, api_key: ApiKey = None) -> None:
    """List your states, newest first."""
    with connected(base_url, api_key, NO_MODEL, Console(stderr=True)) as (client, _):
        states = States(client).list()
    table = Table("name", "id", "tokens", "size", "last used", "points")
    for state in states:
        table.add_row(
            state.name if state.name is not None else "",
            state.id,
            f"{state.num_tokens:,}",
            size_in_words(state.bytes),
            datetime.fromtimestamp(state.last_used_at).isoformat(" ", "minutes"),
            ", ".join(point.name for point in state.points),
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def size_in_words(num_bytes: int) -> str:
    """In the units of the page and the documentation."""
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.1f} kB"


@app.command("export")
def export_command(
    reference: Reference,
    file: Annotated[Path, typer.Argument(help="Safetensors file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it is there.")] = False,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    api_key: ApiKey = None,
) -> None:
    """Write a state to a file that another server of the same model can import."""
    notices = Console(stderr=True)
    if file.exists() and not overwrite:
        _fail(notices, f"{file} exists; --overwrite replaces it")
    with connected(base_url, api_key, NO_MODEL, notices) as (client, _):
        state = _find(client, reference, notices)
        content = States(client).export(state.id)
    try:
        _write(file, content, overwrite=overwrite)
    except FileExistsError:
        _fail(notices, f"{file} exists; --overwrite replaces it")
    except OSError as error:
        _fail(notices, f"cannot write {file}: {error.strerror}")
    notices.print(f"{state.num_tokens:,} tokens, {len(content):,} bytes", highlight=False)


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(help="File that `dijiang state export` has written.")],
    name: Name = None,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    api_key: ApiKey = None,
) -> None:
    """Take in a state; its id goes to standard output."""
    notices = Console(stderr=True)
    try:
        content = file.read_bytes()
    except OSError as error:
        _fail(notices, f"cannot read {file}: {error.strerror}")
    with connected(base_url, api_key, NO_MODEL, notices) as (client, _):
        state = States(client).import_(content, name=name)
    typer.echo(state.id)


@app.command("fork")
def fork_command(
    reference: Reference,
    name: Name = None,
    point: Point = None,
    base_url: BaseUrl = DEFAULT_BASE_URL,
    api_key: ApiKey = None,
) -> None:
    """Make a second state that goes its own way; its id goes to standard output."""
    notices = Console(stderr=True)
    with connected(base_url, api_key, NO_MODEL, notices) as (client, _):
        fork = States(client).fork(_find(client, reference, notices).id, name=name, point=point)
    typer.echo(fork.id)


@app.command("point")
def point_command(
    reference: Reference,
    name: Annotated[str, typer.Argument(help="Name of the point.")],
    base_url: BaseUrl = DEFAULT_BASE_URL,
    api_key: ApiKey = None,
) -> None:
    """Give the position where a state is now a name."""
    notices = Console(stderr=True)
    with connected(base_url, api_key, NO_MODEL, notices) as (client, _):
        States(client).mark(_find(client, reference, notices).id, name)


@app.command("rewind")
def rewind_command(
    reference: Reference,
    point: Annotated[str, typer.Argument(help="Name of the point.")],
    base_url: BaseUrl = DEFAULT_BASE_URL,
    api_key: ApiKey = None,
) -> None:
    """Put a state back to a point."""
    notices = Console(stderr=True)
    with connected(base_url, api_key, NO_MODEL, notices) as (client, _):
        state = States(client).rewind(_find(client, reference, notices).id, point)
    notices.print(f"back at token {state.num_tokens:,}", highlight=False)


@app.command("delete")
def delete_command(reference: Reference, base_url: BaseUrl = DEFAULT_BASE_URL, api_key: ApiKey = None) -> None:
    """Delete a state."""
    notices = Console(stderr=True)
    with connected(base_url, api_key, NO_MODEL, notices) as (client, _):
        States(client).delete(_find(client, reference, notices).id)


def _write(file: Path, content: bytes, *, overwrite: bool) -> None:
    """Writes a whole file or none; raises OSError, of which FileExistsError says that it is there already."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("xb") as opened:
            opened.write(content)
        if not overwrite:
            file.open("xb").close()  # takes the place, for as long as the next line needs
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _find(client: Client, reference: str, notices: Console) -> State:
    states = States(client)
    state = states.get(reference) if reference.startswith(ID_PREFIX) else states.find(reference)
    if state is None:
        _fail(notices, f"you have no state named {reference!r}")
    return state


def _fail(notices: Console, text: str) -> NoReturn:
    notices.print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)
