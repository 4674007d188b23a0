"""Hours in minutes: mixed load, engines killed, everything killed once, and nothing may be lost, wrong or left over.

    dijiang bench soak --minutes 30

A server of our own with a states folder; clients at random (`soak_load`); every `--kill-every` seconds the engine is
killed, and in the middle the whole server, which is started again on the same folder. At the end all saved
states go on with the tokens that they must have, all responses have reached a final status, all slots are free, and
memory and descriptors are set beside those of a fresh server that has done a little of everything.
"""

import asyncio
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.own_server import END_TIMEOUT_S, ServerStartError, served_folder, wait_until_ready
from benchmarks.resilience.soak_load import BACK_WITHIN_S, REPORTED, Load

FINAL = frozenset({"completed", "incomplete", "failed", "cancelled"})
CACHE = "64MiB"
SETTLE_S = 60.0
POLL_S = 0.2
SAMPLE_S = 5.0
MEMORY_RATIO, MEMORY_SLACK = 1.25, 64 << 20
MORE_DESCRIPTORS = 16
WARM_S = 10.0


class SoakServer:
    """A `dijiang serve` on one port and one folder, which may be killed and started again."""

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address, self.key = f"http://127.0.0.1:{port}", f"sk-{secrets.token_hex(8)}"
        self._command = [sys.executable, "-m", "server", "serve", str(model), "--port", str(port)]
        self._command += [
            "--api-keys",
            self.key,
            "--states-folder",
            str(folder),
            "--prefix-cache-memory",
            CACHE,
            *options,
        ]
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it takes requests.

        Raises:
            ServerStartError: it does not come up.
        """
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=self._words)
        wait_until_ready(self._process, self.address, self._words)

    @property
    def processes(self) -> list[psutil.Process]:
        """The service and what it has started."""
        assert self._process is not None
        service = psutil.Process(self._process.pid)
        return [service, *service.children(recursive=True)]

    def kill_engine(self) -> None:
        """`kill -9` of the engine, if there is one."""
        for process in self.processes:
            with suppress(psutil.Error):
                if "server.engine.process.main" in process.cmdline():
                    process.kill()

    def kill(self) -> None:
        """`kill -9` of everything."""
        assert self._process is not None
        for process in self.processes:
            with suppress(psutil.Error):
                process.kill()
        self._process.wait()

    def close(self) -> None:
        """Ends it as an operator does."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()
        self._words.close()


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a server takes: resident memory of all its processes, bytes, and open descriptors."""

    memory: int
    descriptors: int

    @classmethod
    def of(cls, server: SoakServer) -> "Footprint":
        memory = descriptors = 0
        for process in server.processes:
            with suppress(psutil.Error):
                memory += process.memory_info().rss
                descriptors += process.num_fds()
        return cls(memory, descriptors)


@dataclass(slots=True)
class SoakReport:
    """What came of it.

    Attributes:
        seconds: that it ran.
        done: by kind, how often it went well, was refused or cut off.
        engine_kills, server_kills: how many.
        states, responses: that were saved, and are there at the end.
        samples: memory, MiB, every few seconds.
        after, fresh: footprints at the end, and of a fresh server.
        problems: what must not be.
    """

    seconds: float = 0.0
    done: dict[str, int] = field(default_factory=dict)
    engine_kills: int = 0
    server_kills: int = 0
    states: int = 0
    responses: int = 0
    samples: list[float] = field(default_factory=list)
    after: Footprint | None = None
    fresh: Footprint | None = None
    problems: list[str] = field(default_factory=list)


async def soak(
    server: SoakServer, *, seconds: float, num_clients: int, kill_every_s: float, seed: int = 0
) -> SoakReport:
    """Runs the load against a started server, then looks at what is left; the fresh server is the caller's."""
    load, report = Load(server.address, server.key, seed=seed), SoakReport()
    await load.learn()
    begin = time.monotonic()
    clients = asyncio.create_task(load.run(num_clients))
    try:
        await _disturb(server, report, begin + seconds, kill_every_s)
    finally:
        load.stopping = True
        await _until_ended(load, clients)
    report.seconds = time.monotonic() - begin
    await _look_back(load, report)
    report.after = Footprint.of(server)
    report.done = dict(sorted(load.notes.done.items()))
    report.problems += load.notes.problems
    await load.http.aclose()
    return report


async def _disturb(server: SoakServer, report: SoakReport, end: float, kill_every_s: float) -> None:
    """Kills the engine every so often, and everything in the middle; the last part is left in peace."""
    begin = time.monotonic()
    next_kill, next_sample, middle = begin + kill_every_s, begin, (begin + end) / 2
    while (now := time.monotonic()) < end:
        if now >= next_sample:
            next_sample = now + SAMPLE_S
            report.samples.append(round(Footprint.of(server).memory / 2**20, 1))
        if report.server_kills == 0 and now >= middle:
            server.kill()
            report.server_kills += 1
            await asyncio.to_thread(server.start)
            next_kill = max(next_kill, time.monotonic() + kill_every_s / 2)
        elif now >= next_kill and now < end - kill_every_s / 2:
            server.kill_engine()
            report.engine_kills += 1
            next_kill = now + kill_every_s
        await asyncio.sleep(POLL_S)


async def _until_ended(load: Load, clients: "asyncio.Task[None]") -> None:
    """Waits for the clients' last answers, for as long as the engine gets on with them."""
    num_tokens = -1.0
    while True:
        await asyncio.wait({clients}, timeout=BACK_WITHIN_S)
        if clients.done():
            clients.result()
            return
        seen, num_tokens = num_tokens, (await _numbers(load.http))["dijiang_engine_tokens"]
        if num_tokens == seen:
            load.notes.problem(f"clients do not end: {', '.join(load.doing)}")
            clients.cancel()
            await asyncio.wait({clients})
            return


async def _look_back(load: Load, report: SoakReport) -> None:
    """Waits for quiet, then asks for everything that was kept."""
    await _until_idle(load)
    notes = load.notes
    for state_id, number in notes.states.items():
        num_before = notes.done["resumed"]
        await load.check_state(state_id, number)
        if notes.done["resumed"] == num_before:
            notes.problem(f"the state {state_id} is lost")
        else:
            report.states += 1
    for response_id in (*notes.responses, *notes.endings):
        status = await _final_status(load.http, response_id)
        if status in FINAL - ({"failed"} if response_id in notes.endings else set()):
            report.responses += 1
        else:
            notes.problem(f"the response {response_id} is {status}")


async def _until_idle(load: Load) -> None:
    numbers: dict[str, float] = {}
    end = time.monotonic() + SETTLE_S
    while time.monotonic() < end:
        with suppress(httpx.TransportError):
            numbers = await _numbers(load.http)
            busy = numbers["dijiang_num_requests_running"] + numbers["dijiang_num_requests_waiting"]
            if busy == 0 and numbers["dijiang_slots_free"] == numbers["dijiang_slots"]:
                return
        await asyncio.sleep(POLL_S)
    load.notes.problem(f"not idle {SETTLE_S:.0f} s after the last request: {numbers}")


async def _numbers(http: httpx.AsyncClient) -> dict[str, float]:
    lines = (await http.get("/metrics")).text.splitlines()
    values = dict(line.split() for line in lines if line.startswith("dijiang_") and "{" not in line)
    wanted = ("slots", "slots_free", "num_requests_running", "num_requests_waiting", "preempted_states_bytes")
    numbers = {f"dijiang_{name}": float(values.get(f"dijiang_{name}", -1)) for name in wanted}
    tokens = [float(values.get(f"dijiang_engine_{kind}_tokens_total", 0)) for kind in ("prefill", "decode")]
    return numbers | {"dijiang_engine_tokens": sum(tokens)}


async def _final_status(http: httpx.AsyncClient, response_id: str) -> str:
    """The status of a response, once it is final or does not become so."""
    end = time.monotonic() + BACK_WITHIN_S
    while True:
        answer = await http.get(f"/v1/responses/{response_id}")
        status = str(answer.json().get("status")) if answer.status_code == 200 else f"gone ({answer.status_code})"
        if status in FINAL or answer.status_code != 200 or time.monotonic() > end:
            return status
        await asyncio.sleep(POLL_S)


async def fresh_footprint(server: SoakServer, *, seconds: float, num_clients: int) -> Footprint:
    """What a server takes that has done a little of everything for a moment."""
    load = Load(server.address, server.key)
    await load.learn()
    clients = asyncio.create_task(load.run(num_clients))
    await asyncio.sleep(seconds)
    load.stopping = True
    await clients
    await _until_idle(load)
    await load.http.aclose()
    return Footprint.of(server)


def compare(report: SoakReport) -> None:
    """Writes down what a server keeps that it should have given back."""
    assert report.after is not None
    assert report.fresh is not None
    most = int(report.fresh.memory * MEMORY_RATIO) + MEMORY_SLACK
    if report.after.memory > most:
        report.problems.append(f"memory: {report.after.memory:,} bytes, a fresh server {report.fresh.memory:,}")
    if report.after.descriptors > report.fresh.descriptors + MORE_DESCRIPTORS:
        report.problems.append(
            f"descriptors: {report.after.descriptors}, a fresh server has {report.fresh.descriptors}"
        )


def run_soak(
    model: Path, *, seconds: float, num_clients: int, kill_every_s: float, seed: int = 0, options: tuple[str, ...] = ()
) -> SoakReport:
    """The whole of it, with servers of its own.

    Raises:
        ServerStartError: a server does not come up.
    """
    with tempfile.TemporaryDirectory(prefix="dijiang-soak-") as folder:
        server = SoakServer(model, Path(folder, "states"), *options)
        try:
            server.start()
            report = asyncio.run(
                soak(server, seconds=seconds, num_clients=num_clients, kill_every_s=kill_every_s, seed=seed)
            )
        finally:
            server.close()
        fresh = SoakServer(model, Path(folder, "fresh"), *options)
        try:
            fresh.start()
            warm_s = min(WARM_S, seconds)
            report.fresh = asyncio.run(fresh_footprint(fresh, seconds=warm_s, num_clients=num_clients))
        finally:
            fresh.close()
    compare(report)
    return report


def soak_command(
    model: Annotated[Path | None, typer.Argument(help="Folder of a model; the default model if absent.")] = None,
    minutes: Annotated[float, typer.Option(min=0.05, help="Of load.")] = 30.0,
    clients: Annotated[int, typer.Option(min=1, help="At once.")] = 12,
    kill_every: Annotated[float, typer.Option(min=1.0, help="Seconds between two kills of the engine.")] = 120.0,
    threads: Annotated[str, typer.Option(help="CPU threads of the server.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of what the clients do.")] = 0,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep the JSON there.")] = None,
) -> None:
    """Mixed load, kills, and a comparison with a fresh server; fails if anything was lost, wrong or left over."""
    folder = served_folder(model)
    options = ("--threads", threads, "--max-conversations", "32")
    try:
        report = run_soak(
            folder, seconds=60 * minutes, num_clients=clients, kill_every_s=kill_every, seed=seed, options=options
        )
    except ServerStartError as error:
        raise typer.BadParameter(str(error)) from error
    document = {"soak": asdict(report), "load_average": os.getloadavg()}
    if save is not None:
        save.write_text(json.dumps(document, indent=1) + "\n")
    console = Console(width=100, highlight=False)
    table = Table("what", "how often")
    for kind, number in report.done.items():
        table.add_row(kind, f"{number:,}")
    console.print(table)
    console.print(
        f"{report.seconds:,.0f} s, {report.engine_kills} kills of the engine, {report.server_kills} of everything; "
        f"{report.states} states and {report.responses} responses there at the end"
    )
    for problem in report.problems[:REPORTED]:
        console.print(f"problem: {problem}", style="red")
    print(json.dumps(document))
    if report.problems:
        raise typer.Exit(1)
