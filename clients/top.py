"""`dijiang top`: what a running server does at this moment, in the terminal."""

import sys
import time
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from clients.cli import ApiKey, BaseUrl, connected
from clients.client import DEFAULT_BASE_URL, Client
from clients.errors import APIResponseError
from clients.scrape import Interval, Scrape

WIDTH = 100
"""Of a frame that is not shown in a terminal."""
BAR_WIDTH = 32
MAX_KEYS = 20


def top_command(
    base_url: BaseUrl = DEFAULT_BASE_URL,
    api_key: ApiKey = None,
    interval: Annotated[float, typer.Option(min=0.05, max=3600, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame, after one interval, and end.")] = False,
) -> None:
    """Watch a running server: slots, queue by key, tokens a second, gaps, where states are kept, restarts.

    Ends with Ctrl-C. The key is one of the server's if it has --metrics-need-key.
    """
    is_terminal = sys.stdout.isatty()
    console = Console(width=None if is_terminal else WIDTH, highlight=False)
    with connected(base_url, api_key, "", Console(stderr=True)) as (client, _):
        before = _look(client)
        if once or not is_terminal:
            time.sleep(interval)
            console.print(frame(client.root, Interval(before, _look(client))))
            return
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                now = _look(client)
                live.update(frame(client.root, Interval(before, now)), refresh=True)
                before = now


def _look(client: Client) -> Scrape:
    scrape = client.answer(Scrape.call())
    if "dijiang_engine_up" not in scrape.samples:
        raise APIResponseError(f"{client.root}/metrics has no metrics of a DiJiang server")
    return scrape


def frame(address: str, interval: Interval) -> RenderableType:
    """One view of a server, from two looks at it."""
    return Group(_head(address, interval.now), "", _facts(interval), "", _keys(interval))


def _head(address: str, now: Scrape) -> Text:
    is_up = now.value("dijiang_engine_up") == 1
    state = ("engine up", "green") if is_up else ("engine down", "bold red")
    restarts = int(now.value("dijiang_engine_restarts_total"))
    return Text.assemble(("dijiang ", "bold"), address, "   ", state, f"   restarts {restarts:,}")


def _facts(interval: Interval) -> Table:
    now = interval.now
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    num_slots, num_free = (int(now.value(f"dijiang_slots{end}")) for end in ("", "_free"))
    num_running = int(now.value("dijiang_num_requests_running"))
    bar = ProgressBar(total=max(1, num_slots), completed=num_running, width=BAR_WIDTH)
    waiting = int(now.value("dijiang_num_requests_waiting"))
    table.add_row("slots", bar, f"{num_running:,} of {num_slots:,} in use, {num_free:,} free, {waiting:,} waiting")
    decoded, read = (interval.rate(f"dijiang_engine_{what}_tokens_total") for what in ("decode", "prefill"))
    table.add_row("tokens/s", f"answers {decoded:,.1f}", f"prompts {read:,.1f}")
    steps = interval.rate("dijiang_engine_steps_total")
    busy = min(1.0, interval.rate("dijiang_engine_step_seconds_total"))
    table.add_row("steps/s", f"{steps:,.1f}", f"computing {busy:.0%} of the time")
    for name, metric in (("gaps", "inter_token_latency"), ("first token", "time_to_first_token")):
        half, most = (interval.quantile(share, f"dijiang_{metric}_seconds") for share in (0.5, 0.95))
        table.add_row(name, f"half within {_ms(half)}", f"95 % within {_ms(most)}")
    preempted = interval.rate("dijiang_preemptions_total")
    table.add_row("preempted", f"{preempted:,.2f} a second", f"{_mib(now, 'preempted_states_bytes')} of their states")
    _add_states(table, now)
    return table


def _add_states(table: Table, now: Scrape) -> None:
    """Where states are kept: in slots, in the prefix cache, saved."""
    each = now.value("dijiang_state_bytes_per_slot") / 2**20
    table.add_row("states", f"slots {_mib(now, 'state_bytes')}", f"{each:,.2f} MiB each, whatever their length")
    entries, hits = int(now.value("dijiang_prefix_cache_entries")), now.value("dijiang_prefix_cache_hits_total")
    share = hits / max(1.0, now.value("dijiang_prefix_cache_queries_total"))
    table.add_row(
        "", f"prefix cache {_mib(now, 'prefix_cache_bytes')}", f"{entries:,} states, {share:.0%} of prompts hit"
    )
    if "dijiang_saved_states" in now.samples:
        most = _mib(now, "saved_states_max_bytes")
        away = "" if now.value("dijiang_state_store_up") else ", STORE AWAY"
        saved = int(now.value("dijiang_saved_states"))
        table.add_row("", f"saved {_mib(now, 'saved_states_bytes')}", f"{saved:,} conversations, at most {most}{away}")


def _keys(interval: Interval) -> Table:
    now = interval.now
    table = Table("key", box=None, pad_edge=False, header_style="bold")
    for title in ("running", "waiting", "ended/s", "tokens/s", "first token, 95 %"):
        table.add_column(title, justify="right")
    rows = []
    for key in sorted(now.labelled("tenant")):
        running, waiting = (
            now.value(f"dijiang_tenant_requests_{state}", tenant=key) for state in ("running", "waiting")
        )
        ends = [dict(labels) for labels in now.samples.get("dijiang_tenant_requests_finished_total", {})]
        ended = sum(
            interval.rate("dijiang_tenant_requests_finished_total", **labels)
            for labels in ends
            if labels["tenant"] == key
        )
        tokens = sum(
            interval.rate(f"dijiang_tenant_{what}_tokens_total", tenant=key) for what in ("prompt", "generation")
        )
        first = interval.quantile(0.95, "dijiang_tenant_time_to_first_token_seconds", tenant=key)
        shown = (key, f"{running:,.0f}", f"{waiting:,.0f}", f"{ended:,.1f}", f"{tokens:,.1f}", _ms(first))
        rows.append((-running - waiting, -ended, shown))
    for *_, shown in sorted(rows)[:MAX_KEYS]:
        table.add_row(*shown)
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:,.1f} ms"


def _mib(now: Scrape, name: str) -> str:
    return f"{now.value(f'dijiang_{name}') / 2**20:,.1f} MiB"
