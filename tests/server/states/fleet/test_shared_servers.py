"""Two real servers on one PostgreSQL: every conversation goes on at either, and outlives any of them."""

import contextlib
import secrets
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.states.postgres_server import PostgresServer
from tests.server.states.running import BOB, Running, bearer, cached, running, start
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.slow
FOR_EVER: dict[str, Any] = {"input": "Hi", "temperature": 0, "max_output_tokens": 1_000_000, "background": True}


@dataclass
class Two:
    """Two servers, and how to start a third one."""

    one: Running
    two: Running
    model: Path
    copies: Path
    options: tuple[str, ...]

    def start(self, name: str, *options: str) -> Running:
        """Another replica, on a machine of its own as far as it can tell."""
        return start(self.model, self.copies / name, *self.options, *options)


@pytest.fixture(scope="module")
def two(tiny: Path, postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    copies = tmp_path_factory.mktemp("copies")
    options = ("--state-store", postgres.url, "--state-store-schema", f"test_{secrets.token_hex(8)}")
    with running(tiny, copies / "here", *options) as one, running(tiny, copies / "here", *options) as other:
        yield Two(one, other, tiny, copies, options)


def test_a_conversation_goes_on_at_the_other_server_as_it_would_have_here(two: Two) -> None:
    first = two.one.complete("My name is Ann.", return_state={"name": "talk"})
    here = two.one.complete(" Who?", state_id=first["state_id"])
    there = two.two.complete(" Who?", state_id=first["state_id"], return_state={"update": True})
    assert there["token_ids"] == here["token_ids"]
    assert cached(there["usage"]) == first["usage"]["total_tokens"] - 1
    assert there["state_id"] == first["state_id"]
    whole = two.one.complete([*first["prompt_token_ids"], *first["token_ids"], *there["prompt_token_ids"]])
    assert whole["token_ids"] == there["token_ids"]
    here, there = (server.chat(("user", "Go on."), state_id=first["state_id"]) for server in (two.one, two.two))
    assert there["token_ids"] == here["token_ids"]


def test_points_forks_and_deletion_are_the_same_everywhere(two: Two) -> None:
    state = two.one.post("/v1/states", prompt="A tale", name="tale")["id"]
    two.two.post(f"/v1/states/{state}/points", name="start")
    begin = two.one.get(f"/v1/states/{state}")
    grown = two.one.complete(" of two", state_id=state, return_state={"update": True})
    assert grown["state_id"] == state
    fork = two.two.post(f"/v1/states/{state}/fork", point="start", name="other tale")
    assert fork["num_tokens"] == begin["num_tokens"]
    back = two.two.post(f"/v1/states/{state}/rewind", point="start")
    assert back["num_tokens"] == begin["num_tokens"]
    here, there = two.one.complete(" on", state_id=state), two.two.complete(" on", state_id=fork["id"])
    assert there["token_ids"] == here["token_ids"]
    taken = {"prompt": "x", "name": "other tale"}
    assert two.one.refused("POST", "/v1/states", json=taken)[:2] == (409, "state_name_taken")
    assert two.two.http.delete(f"/v1/states/{state}").status_code == 200
    assert two.one.refused("GET", f"/v1/states/{state}")[:2] == (404, "state_not_found")
    assert two.one.complete(" on", state_id=fork["id"])["token_ids"] == there["token_ids"]


def test_what_one_exports_the_other_imports(two: Two) -> None:
    state = two.one.post("/v1/states", prompt="To be moved")["id"]
    file = two.two.http.get(f"/v1/states/{state}/export")
    assert file.status_code == 200
    headers = bearer(BOB) | {"content-type": "application/octet-stream"}
    moved = two.one.http.post("/v1/states/import", content=file.content, headers=headers)
    assert moved.status_code == 200, moved.text
    there, here = two.two.complete("!", BOB, state_id=moved.json()["id"]), two.two.complete("!", state_id=state)
    assert there["token_ids"] == here["token_ids"]
    assert two.two.http.delete(f"/v1/states/{moved.json()['id']}", headers=bearer(BOB)).status_code == 200


def test_another_key_finds_nothing_at_either(two: Two) -> None:
    state = two.one.post("/v1/states", prompt="Mine")["id"]
    for server in (two.one, two.two):
        assert server.refused("GET", f"/v1/states/{state}", BOB)[:2] == (404, "state_not_found")
        assert server.refused("POST", "/v1/completions", BOB, json={"prompt": "x", "state_id": state})[0] == 404


def test_a_time_to_live_ends_everywhere(two: Two) -> None:
    state = two.one.post("/v1/states", prompt="Brief", ttl_s=2)["id"]
    until(lambda: two.two.http.get(f"/v1/states/{state}").status_code == 404)


def test_responses_go_on_at_the_other_server(two: Two) -> None:
    ask: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 6}
    first = two.one.client.responses.create(input="My name is Ann.", **ask)
    here = two.one.client.responses.create(input="Who?", previous_response_id=first.id, **ask)
    there = two.two.client.responses.create(input="Who?", previous_response_id=first.id, **ask)
    assert (there.output_text, there.usage) == (here.output_text, here.usage)
    assert there.usage is not None
    assert there.usage.input_tokens_details.cached_tokens > 0
    assert two.one.client.responses.retrieve(there.id).output_text == there.output_text
    two.one.client.responses.delete(first.id)
    assert two.two.refused("GET", f"/v1/responses/{first.id}")[:2] == (404, "response_not_found")


def test_a_response_is_cancelled_at_the_other_server(two: Two) -> None:
    started = two.one.post("/v1/responses", **FOR_EVER)
    assert two.two.get(f"/v1/responses/{started['id']}")["status"] == "in_progress"
    assert two.two.post(f"/v1/responses/{started['id']}/cancel")["status"] == "cancelled"
    assert two.one.get(f"/v1/responses/{started['id']}")["status"] == "cancelled"
    wait_until_idle(two.one)
    assert two.one.get(f"/v1/responses/{started['id']}")["status"] == "cancelled"


def test_a_store_that_is_away_is_a_503_and_comes_back_by_itself(two: Two, postgres: PostgresServer) -> None:
    state = two.one.post("/v1/states", prompt="Kept")["id"]
    started = two.one.post("/v1/responses", **FOR_EVER)
    postgres.stop()
    try:
        for path, body in (
            ("/v1/completions", {"prompt": "x", "state_id": state}),
            ("/v1/completions", {"prompt": "x", "return_state": True}),
            ("/v1/responses", {"input": "x"}),
            ("/v1/states", {"prompt": "x"}),
        ):
            response = two.two.http.post(path, json=body)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "state_store_unavailable")
            assert response.headers["retry-after"] == "2"
        assert two.two.refused("GET", f"/v1/states/{state}") == (503, "state_store_unavailable", None)
        assert two.two.gauge("dijiang_state_store_up") == 0
        assert two.two.complete("x")["finish_reason"] == "length"
    finally:
        postgres.start()
    assert two.two.complete("!", state_id=state)["finish_reason"] == "length"
    assert two.two.gauge("dijiang_state_store_up") == 1
    assert two.two.get(f"/v1/responses/{started['id']}")["status"] == "in_progress"
    assert two.one.post(f"/v1/responses/{started['id']}/cancel")["status"] == "cancelled"
    wait_until_idle(two.one)


def test_a_server_that_stops_finishes_its_answers_and_a_second_signal_ends_the_rest(two: Two) -> None:
    third = two.start("third", "--drain-timeout-s", "600", "--speculate", "0")
    try:
        started = third.post("/v1/responses", **FOR_EVER)
        answers: list[dict[str, Any]] = []
        body = {"max_tokens": 20_000, "ignore_eos": True, "return_state": True}  # longer than the gauge is old
        asking = threading.Thread(target=lambda: answers.append(third.complete("On", **body)))
        asking.start()
        until(lambda: third.gauge("dijiang_num_requests_running") == 2)
        third.process.send_signal(signal.SIGTERM)
        asking.join(PATIENCE_S)
        third.process.send_signal(signal.SIGTERM)
        assert third.process.wait(PATIENCE_S) == 0
    finally:
        third.kill()
        third.close()
    answer = answers[0]
    kept = two.one.get(f"/v1/states/{answer['state_id']}")
    assert kept["num_tokens"] == answer["usage"]["total_tokens"]
    assert two.one.get(f"/v1/responses/{started['id']}")["status"] == "failed"  # nobody has cancelled it


def test_a_kill_leaves_whole_states_and_no_response_for_ever_in_progress(two: Two) -> None:
    third = two.start("killed")
    stop = threading.Event()
    kept: list[str] = []

    def save_on_and_on() -> None:
        with httpx.Client(base_url=third.base_url, headers=bearer(BOB), timeout=PATIENCE_S, trust_env=False) as http:
            while not stop.is_set():
                with contextlib.suppress(httpx.TransportError):
                    kept.append(http.post("/v1/states", json={"prompt": "To be kept."}).json()["id"])

    threads = [threading.Thread(target=save_on_and_on) for _ in range(3)]
    try:
        started = third.post("/v1/responses", **FOR_EVER)
        for thread in threads:
            thread.start()
        until(lambda: len(kept) >= 15)
    finally:
        third.kill()
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        third.close()
    again = two.start("killed", "--drain-timeout-s", "0.2")
    try:
        for server in (again, two.one):
            assert server.get(f"/v1/responses/{started['id']}")["status"] in ("queued", "in_progress")
        assert two.two.post(f"/v1/responses/{started['id']}/cancel")["status"] == "cancelled"
        found = {state["id"] for state in two.one.get("/v1/states?limit=100", BOB)["data"]}
        assert {*kept} <= found
        expected = two.one.complete("To be kept.!", cache_prompt=False)["token_ids"]
        for state_id in found:
            assert two.two.complete("!", BOB, state_id=state_id)["token_ids"] == expected
        # What is not complete when the time to drain is over goes on at another server.
        started = again.post("/v1/responses", **FOR_EVER)
        again.process.send_signal(signal.SIGTERM)
        assert again.process.wait(PATIENCE_S) == 0
        until(lambda: two.one.get(f"/v1/responses/{started['id']}")["status"] == "in_progress")
        assert two.two.post(f"/v1/responses/{started['id']}/cancel")["status"] == "cancelled"
    finally:
        again.close()


def wait_until_idle(server: Running) -> None:
    until(lambda: server.gauge("dijiang_num_requests_running") == 0)
