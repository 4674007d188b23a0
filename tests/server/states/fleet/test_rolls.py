"""Servers that are replaced one by one under load, behind a plain balancer, with clients that never try again."""

import itertools
import secrets
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.states.fleet.balancer import Balancer
from tests.server.states.postgres_server import PostgresServer
from tests.server.states.running import ANN, Running, start
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.slow
DELAY_S = 5
"""The balancer looks ten times a second: far longer than it takes to notice, also on a loaded machine."""


@dataclass
class Load:
    """Clients that ask on and on, each over connections of its own, and never a second time."""

    url: str
    answers: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def new_connections(self) -> None:
        while not self.stop.is_set():
            with httpx.Client(trust_env=False, timeout=PATIENCE_S, headers=_KEY) as http:
                self._ask(http, "/v1/completions", prompt="Hello", max_tokens=8)

    def kept_connection(self) -> None:
        with httpx.Client(trust_env=False, timeout=PATIENCE_S, headers=_KEY) as http:
            while not self.stop.is_set():
                self._ask(http, "/v1/completions", prompt="On", max_tokens=200, ignore_eos=True, stream=True)

    def one_conversation(self) -> None:
        with httpx.Client(trust_env=False, timeout=PATIENCE_S, headers=_KEY) as http:
            state = self._ask(http, "/v1/states", prompt="A tale").json()["id"]
            for number in itertools.count(1):
                if self.stop.is_set():
                    break
                more = {"prompt": " and", "max_tokens": 4, "ignore_eos": True, "state_id": state}
                self._ask(http, "/v1/completions", return_state={"update": True}, **more)
                kept = self._ask(http, f"/v1/states/{state}", method="GET").json()
                if kept["num_tokens"] != 6 + number * 8:
                    self.problems.append(f"a turn was lost: {kept}")
                    break

    def _ask(self, http: httpx.Client, path: str, *, method: str = "POST", **body: Any) -> httpx.Response:
        try:
            answer = http.request(method, f"{self.url}{path}", json=body or None)
        except httpx.HTTPError as error:
            self.problems.append(f"{path}: {error!r}")
            self.stop.set()
            raise
        ended = "data: [DONE]" in answer.text and "error" not in answer.text
        if answer.status_code != 200 or (body.get("stream") and not ended):
            self.problems.append(f"{path}: {answer.status_code} {answer.text[-300:]}")
        self.answers[answer.headers.get("x-dijiang-replica", "none")] += 1
        return answer


_KEY = {"authorization": f"Bearer {ANN}"}


@contextmanager
def load_on(url: str) -> Iterator[Load]:
    """Puts load on an address until the context is left."""
    load = Load(url)
    targets = (load.new_connections, load.kept_connection, load.one_conversation)
    threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        load.stop.set()
        for thread in threads:
            thread.join(PATIENCE_S)


def test_four_rolls_of_two_servers_under_load_fail_no_request(
    tiny: Path, postgres: PostgresServer, tmp_path: Path
) -> None:
    options = ("--state-store", postgres.url, "--state-store-schema", f"test_{secrets.token_hex(8)}")
    options += ("--drain-delay-s", str(DELAY_S), "--drain-timeout-s", "600")

    def started(name: str, port: int | None = None) -> Running:
        return start(tiny, tmp_path / name.split("-")[0], *options, "--replica-name", name, port=port)

    with ExitStack() as stack:
        servers = [started("a-0"), started("b-0")]
        stack.callback(lambda: [server.close() for server in servers])
        balancer = stack.enter_context(Balancer([server.port for server in servers]))
        with load_on(balancer.url) as load:
            for roll in range(4):
                number = roll % 2
                old, name = servers[number], f"{'ab'[number]}-{roll + 1}"
                until(lambda: all(server.port in balancer.ready for server in servers))
                until(_more_answers(load))
                old.process.send_signal(signal.SIGTERM)
                assert old.process.wait(PATIENCE_S) == 0
                old.close()
                servers[number] = started(name, old.port)
                until(_answers_of(load, name))
        assert load.problems == []
    assert {*load.answers} == {"a-0", "b-0", "a-1", "b-2", "a-3", "b-4"}


def _more_answers(load: Load) -> Any:
    before = load.answers.total()
    return lambda: load.problems or load.answers.total() > before + 5


def _answers_of(load: Load, name: str) -> Any:
    return lambda: load.problems or load.answers[name] > 0
