"""Two real servers and a real PostgreSQL on the days that fleets have; `docs/states.md` says what to expect."""

import hashlib
import secrets
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.keys import owner_of
from tests.server.states.index.tables_of_version_1 import in_postgresql
from tests.server.states.postgres_server import PostgresServer
from tests.server.states.running import ANN, Running, running, start
from tests.tiny_models import write_tiny_model
from tests.waiting import PATIENCE_S, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FOR_EVER: dict[str, Any] = {"input": "Hi", "temperature": 0, "max_output_tokens": 1_000_000, "background": True}
LONG: dict[str, Any] = {"input": "Tell me.", "seed": 5, "max_output_tokens": 12_000, "ignore_eos": True}


def store(postgres: PostgresServer) -> tuple[str, ...]:
    return "--state-store", postgres.url, "--state-store-schema", f"test_{secrets.token_hex(8)}"


@contextmanager
def two_of(model: Path, folder: Path, *options: str) -> Iterator[tuple[Running, Running]]:
    """Two servers, each on a machine of its own as far as it can tell."""
    with ExitStack() as stack:
        one, two = (stack.enter_context(running(model, folder / name, *options)) for name in ("one", "two"))
        yield one, two


@pytest.fixture(scope="module")
def both(
    tiny: Path, postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, Running]]:
    options = (*store(postgres), "--state-store-connections", "2", "--state-store-timeout-s", "2")
    with two_of(tiny, tmp_path_factory.mktemp("pair"), *options) as both:
        yield both


@pytest.fixture
def pair(both: tuple[Running, Running]) -> tuple[Running, Running]:
    """Two servers that have found the store again, which another test may have stopped for a while."""
    for server in both:
        until(lambda server=server: server.http.get("/v1/states/state_none").status_code == 404)
        until(lambda server=server: server.gauge("dijiang_state_store_up") == 1)
    return both


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def status_of(server: Running, response_id: str) -> str:
    return str(server.get(f"/v1/responses/{response_id}")["status"])


def test_a_store_that_hangs_is_a_503_at_every_server_and_said_in_its_log(
    pair: tuple[Running, Running], postgres: PostgresServer
) -> None:
    state = pair[0].post("/v1/states", prompt="Kept")["id"]
    with postgres.hanging():
        for server in pair:
            refused = server.refused("POST", "/v1/completions", json={"prompt": "x", "state_id": state})
            assert refused[:2] == (503, "state_store_unavailable")
            assert server.refused("GET", f"/v1/states/{state}")[:2] == (503, "state_store_unavailable")
            assert server.gauge("dijiang_state_store_up") == 0
            assert server.http.get("/ready").status_code == 200
            assert server.complete("x")["finish_reason"] == "length"
            answer = server.http.get(f"/v1/states/{state}")
            assert "x-dijiang-retry" not in answer.headers, "no other replica has another store"
    for server in pair:
        until(lambda server=server: server.http.get(f"/v1/states/{state}").status_code == 200)
        assert server.gauge("dijiang_state_store_up") == 1
        assert "the store of states does not answer" in server.log.read_text()


def test_a_requests_own_deadline_begins_at_its_arrival_also_while_the_store_hangs(
    tiny: Path, postgres: PostgresServer, tmp_path: Path
) -> None:
    with running(tiny, tmp_path / "one", *store(postgres), "--state-store-timeout-s", "60") as server:
        state = server.post("/v1/states", prompt="Kept")["id"]
        response = server.post("/v1/responses", input="Kept", max_output_tokens=2)["id"]
        asks: list[tuple[str, dict[str, Any]]] = [
            ("/v1/completions", {"prompt": "x", "state_id": state}),
            ("/v1/completions", {"prompt": "x", "return_state": True}),
            ("/v1/states", {"prompt": "x"}),
            ("/v1/responses", {"input": "x"}),
            ("/v1/responses", {"input": "x", "previous_response_id": response}),
        ]
        with postgres.hanging():
            for path, body in asks:
                assert server.refused("POST", path, json={**body, "timeout": 1})[:2] == (504, "timeout")
        assert server.complete("!", state_id=state)["finish_reason"] == "length"


def test_a_suspended_response_waits_for_a_server_of_its_weights(
    tiny: Path, postgres: PostgresServer, tmp_path: Path
) -> None:
    other = write_tiny_model(tmp_path / "models" / "other", seed=7)
    options = (*store(postgres), "--served-model-name", "same", "--admin-keys", "root")
    with ExitStack() as stack:
        old = start(tiny, tmp_path / "one", *options, "--drain-timeout-s", "0.2")
        try:
            old.post("/v1/states", prompt="Kept")
            new = stack.enter_context(running(other, tmp_path / "two", *options))
            until(lambda: "has 1 states and 0 waiting responses that only servers of another" in new.log.read_text())
            expected = old.post("/v1/responses", **LONG)
            started = old.post("/v1/responses", **LONG, background=True)["id"]
            old.process.send_signal(signal.SIGTERM)
            assert old.process.wait(PATIENCE_S) == 0
        finally:
            old.close()
        own = new.post("/v1/responses", **FOR_EVER)["id"]
        new.post("/admin/drain", "root", hand_over=True)
        assert status_of(new, own) == "queued"
        new.post("/admin/resume", "root")
        until(lambda: status_of(new, own) == "in_progress")  # it has looked for what waits
        assert status_of(new, started) == "queued"
        with running(tiny, tmp_path / "one", *options) as back:
            until(lambda: status_of(back, started) not in ("queued", "in_progress"))
            response = back.get(f"/v1/responses/{started}")
            assert (response["status"], text_of(response)) == (expected["status"], text_of(expected))


def test_many_saves_at_once_wait_for_few_connections(pair: tuple[Running, Running]) -> None:
    def save(number: int) -> int:
        server = pair[number % 2]
        return server.http.post("/v1/states", json={"prompt": f"State {number}"}).status_code

    with ThreadPoolExecutor(32) as pool:
        assert [*pool.map(save, range(128))] == [200] * 128


def test_servers_that_may_have_more_connections_than_the_store_gives_wait_for_each_other(
    tiny: Path, postgres: PostgresServer, tmp_path: Path
) -> None:
    postgres.ask("CREATE ROLE few LOGIN CONNECTION LIMIT 5")
    postgres.ask("GRANT CREATE ON DATABASE postgres TO few")
    options = ("--state-store", postgres.url.replace("dijiang@", "few@"), *store(postgres)[2:])
    with two_of(tiny, tmp_path, *options, "--state-store-connections", "8") as pair, ThreadPoolExecutor(32) as pool:
        saved = pool.map(lambda n: pair[n % 2].post("/v1/states", prompt=f"State {n}")["id"], range(128))
        assert len({*saved}) == 128


def test_pages_go_on_at_another_server_though_states_between_them_are_deleted(pair: tuple[Running, Running]) -> None:
    one, two = pair
    made = [one.post("/v1/states", prompt=f"Page {number}")["id"] for number in range(6)]
    page = one.get("/v1/states?limit=3")
    assert [state["id"] for state in page["data"]] == made[:2:-1]
    for state in page["data"]:
        assert one.http.delete(f"/v1/states/{state['id']}").status_code == 200
    after = two.get(f"/v1/states?limit=3&after={page['next_cursor']}")
    assert [state["id"] for state in after["data"]] == made[2::-1]


def test_a_response_of_a_killed_server_completes_at_another_machine_with_the_same_text(
    pair: tuple[Running, Running], tiny: Path, postgres: PostgresServer, tmp_path: Path
) -> None:
    options = store(postgres)
    with running(tiny, tmp_path / "two", *options) as two:
        one = start(tiny, tmp_path / "one", *options)
        try:
            expected = one.post("/v1/responses", **LONG)
            started = one.post("/v1/responses", **LONG, background=True)["id"]
            one.kill()
        finally:
            one.close()
        until(lambda: status_of(two, started) not in ("queued", "in_progress"))  # a lease later
        response = two.get(f"/v1/responses/{started}")
        assert (response["status"], text_of(response)) == (expected["status"], text_of(expected))


def test_a_request_that_is_sent_again_to_another_server_is_the_same_response(pair: tuple[Running, Running]) -> None:
    headers = {"idempotency-key": secrets.token_hex(8)}
    body = {"input": "x", "max_output_tokens": 8}
    answers = [server.http.post("/v1/responses", json=body, headers=headers) for server in (*pair, pair[0])]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert [answer.headers.get("idempotent-replayed") for answer in answers] == [None, "true", "true"]


def test_a_stopped_rank_is_noticed_and_leaves_no_orphan(tiny: Path, postgres: PostgresServer, tmp_path: Path) -> None:
    options = (*store(postgres), "--tensor-parallel", "2", "--heartbeat-s", "2")
    with running(tiny, tmp_path / "one", *options) as server:
        state = server.complete("Once upon a time", return_state={})["state_id"]
        before = server.complete(None, state_id=state, max_tokens=12)["token_ids"]
        ranks_of(server)[-1].send_signal(signal.SIGSTOP)
        answers: list[int] = []
        asking = threading.Thread(
            target=lambda: answers.append(server.http.post("/v1/completions", json={"prompt": "x"}).status_code)
        )
        asking.start()
        until(lambda: server.http.get("/ready").status_code == 503)
        asking.join(PATIENCE_S)
        assert answers, "a request that hung with the rank ends with it"
        until(lambda: server.http.get("/ready").status_code == 200)
        assert server.gauge("dijiang_engine_restarts_total") == 1
        assert server.complete(None, state_id=state, max_tokens=12)["token_ids"] == before
        ranks = ranks_of(server)
        ranks[-1].send_signal(signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == 0
        psutil.wait_procs(ranks, PATIENCE_S)
        assert not any(rank.is_running() for rank in ranks)


def ranks_of(server: Running) -> list[psutil.Process]:
    """The engine process and its further ranks."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if any("server.engine" in word for word in child.cmdline())]


def test_a_later_schema_under_a_running_server_is_a_503_and_nothing_is_written(
    tiny: Path, postgres: PostgresServer, tmp_path: Path
) -> None:
    options = store(postgres)
    with running(tiny, tmp_path / "one", *options) as server:
        state = server.post("/v1/states", prompt="Kept")["id"]
        count = f"SELECT count(*) FROM {options[-1]}.snapshots"
        before = postgres.ask(count)
        postgres.ask(f"UPDATE {options[-1]}.version SET number = 99")
        assert server.refused("POST", "/v1/states", json={"prompt": "x"})[:2] == (503, "state_store_unavailable")
        assert postgres.ask(count) == before
        assert server.complete("x")["finish_reason"] == "length"
        postgres.ask(f"UPDATE {options[-1]}.version SET number = 3")
        assert server.complete("!", state_id=state)["finish_reason"] == "length"


def test_tables_of_an_earlier_version_are_migrated_at_the_start_with_what_they_have(
    tiny: Path, postgres: PostgresServer, tmp_path: Path
) -> None:
    options = store(postgres)
    postgres.ask(in_postgresql(options[-1]))
    postgres.ask(f"UPDATE {options[-1]}.states SET owner = %s", owner_of(hashlib.sha256(ANN.encode()).digest()))
    with running(tiny, tmp_path / "one", *options) as server:
        made = server.post("/v1/states", prompt="Kept")["id"]
        assert [state["id"] for state in server.get("/v1/states")["data"]] == [made, "state_1"]
        assert server.complete("!", state_id=made)["finish_reason"] == "length"
