"""`dijiang ray deploy`: a fleet on a Ray cluster, or on this machine alone."""

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from server.fleet.config import FleetConfig, FleetConfigError, read_config

app = typer.Typer(add_completion=False, help="Many engines behind one address, with Ray Serve.")


@app.callback()
def _group() -> None:
    """Many engines behind one address, with Ray Serve."""


@app.command()
def deploy(
    config: Annotated[Path, typer.Argument(help="TOML file with the tables [fleet] and [serve].")],
    address: Annotated[
        str, typer.Option(help="Of a running Ray cluster; local: a cluster of this machine, until Ctrl-C.")
    ] = "auto",
    host: Annotated[str, typer.Option(help="Where Ray Serve listens, if it does not yet.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Likewise.")] = 8000,
) -> None:
    """Start a fleet, or replace the engines of a running one by engines of another configuration, one by one."""
    console = Console(stderr=True)
    try:
        read = read_config(config)
    except FleetConfigError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(1) from error
    try:
        import ray
    except ImportError as error:
        console.print(f"[red]error:[/red] this needs Ray: pip install 'dijiang\\[ray]' ({error})", highlight=False)
        raise typer.Exit(1) from error
    is_local = address == "local"
    ray.init(
        address="local" if is_local else address, log_to_driver=is_local, include_dashboard=False if is_local else None
    )
    _run(read, host, port)
    where = ray.get_runtime_context().gcs_address
    console.print(f"{read.fleet.name} serves at http://{host}:{port}/v1; the cluster is {where}", highlight=False)
    if is_local:
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()
        from ray import serve

        serve.shutdown()
        ray.shutdown()


def _run(config: FleetConfig, host: str, port: int) -> None:
    from ray import serve
    from ray.serve.config import HTTPOptions

    from server.fleet.application import build

    serve.start(http_options=HTTPOptions(host=host, port=port, request_timeout_s=None, keep_alive_timeout_s=120))
    serve.run(build(config.model_dump()), name=config.fleet.name, route_prefix="/")
