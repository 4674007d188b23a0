"""What becomes of responses and states when a server dies, a store is away, or an answer gets lost on its way."""

import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.server.states.postgres_server import PostgresServer
from tests.server.states.running import BOB, Running, bearer, running, start
from tests.waiting import PATIENCE_S, until

ASK: dict[str, Any] = {"input": "Tell me.", "seed": 5, "temperature": 1.0, "max_output_tokens": 300, "ignore_eos": True}


def engine_of(server: Running) -> psutil.Process:
    children = psutil.Process(server.process.pid).children()
    return next(child for child in children if any("engine.process" in word for word in child.cmdline()))


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def ended(server: Running, response_id: str) -> dict[str, Any]:
    """A response, when it has; a store that is away meanwhile is waited for."""

    def has_ended() -> bool:
        answer = server.http.get(f"/v1/responses/{response_id}")
        assert answer.status_code in (200, 503), answer.text
        return answer.status_code == 200 and answer.json()["status"] not in ("queued", "in_progress")

    until(has_ended)
    return server.get(f"/v1/responses/{response_id}")


@pytest.mark.slow
def test_a_response_whose_server_was_killed_is_completed_with_the_same_text(tiny: Path, tmp_path: Path) -> None:
    server = start(tiny, tmp_path / "states")
    try:
        expected = server.post("/v1/responses", **ASK)
        first = server.post("/v1/responses", input="My name is Ann.", max_output_tokens=4)["id"]
        follow = {**ASK, "previous_response_id": first}
        expected_after = server.post("/v1/responses", **follow)
        started = [server.post("/v1/responses", **body, background=True)["id"] for body in (ASK, follow)]
        lines = server.http.stream("GET", f"/v1/responses/{started[0]}?stream=true")
        with lines as stream:
            for number, _ in enumerate(stream.iter_lines()):
                if number > 20:  # it has begun
                    break
        server.kill()
    finally:
        server.close()
    server = start(tiny, tmp_path / "states")
    try:
        for response_id, wanted in zip(started, (expected, expected_after), strict=True):
            response = ended(server, response_id)
            assert (response["status"], text_of(response)) == (wanted["status"], text_of(wanted))
            assert response["usage"]["output_tokens"] == wanted["usage"]["output_tokens"] == 300
        events = server.http.get(f"/v1/responses/{started[0]}?stream=true").text
        assert events.count("event: response.created") == 1
        assert events.count("event: response.incomplete") == 1
    finally:
        server.close()


@pytest.mark.slow
def test_a_response_whose_engine_failed_is_made_anew_once_with_the_same_text(tiny: Path, tmp_path: Path) -> None:
    ask = {**ASK, "max_output_tokens": 24_000}  # long enough for the gauge, reported once a second, to see it running
    with running(tiny, tmp_path / "states") as server:
        wanted = server.post("/v1/responses", **ASK)
        response_id = server.post("/v1/responses", **ask, background=True)["id"]
        for _ in range(2):
            until(lambda: server.gauge("dijiang_num_requests_running") >= 1)
            num_restarts = server.gauge("dijiang_engine_restarts_total")
            engine_of(server).kill()
            until(lambda: server.gauge("dijiang_engine_restarts_total") > num_restarts)  # noqa: B023
            until(lambda: server.http.get("/ready").status_code == 200)
        response = ended(server, response_id)
        assert (response["status"], response["error"]["code"]) == ("failed", "engine_restarting"), "it may be its fault"
        response_id = server.post("/v1/responses", **ask, background=True)["id"]
        until(lambda: server.gauge("dijiang_num_requests_running") >= 1)
        engine_of(server).kill()
        response = ended(server, response_id)
        assert response["status"] == "incomplete"
        assert response["usage"]["output_tokens"] == 24_000
        assert text_of(response).startswith(text_of(wanted)[:100])


def keyed(server: Running, key: str, owner: str | None = None, **body: Any) -> Any:
    headers = {"idempotency-key": key} | ({} if owner is None else bearer(owner))
    return server.http.post("/v1/responses", json={"input": "x", "max_output_tokens": 8, **body}, headers=headers)


def test_a_request_that_is_sent_again_with_its_key_is_the_same_response(server: Running) -> None:
    key = secrets.token_hex(8)
    first, second, third = (keyed(server, key) for _ in range(3))
    assert first.json() == second.json() == third.json()
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert keyed(server, key + "x").json()["id"] != first.json()["id"]
    assert keyed(server, key, owner=BOB).json()["id"] != first.json()["id"]


def test_requests_with_one_key_at_once_are_one_response(server: Running) -> None:
    key, answers = secrets.token_hex(8), []
    threads = [
        threading.Thread(target=lambda: answers.append(keyed(server, key, max_output_tokens=200))) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [answer.status_code for answer in answers] == [200] * 5
    assert len({answer.text for answer in answers}) == 1


def test_streams_and_background_responses_have_keys_too(server: Running) -> None:
    key = secrets.token_hex(8)
    first, second = (keyed(server, key, stream=True) for _ in range(2))
    assert [line for line in first.text.splitlines() if line.startswith("event: ")] == [
        line for line in second.text.splitlines() if line.startswith("event: ")
    ]
    key = secrets.token_hex(8)
    first, second = (keyed(server, key, background=True) for _ in range(2))
    assert first.json()["id"] == second.json()["id"]


def test_a_key_of_another_request_is_refused(server: Running) -> None:
    key = secrets.token_hex(8)
    assert keyed(server, key).status_code == 200
    other = keyed(server, key, temperature=0.5)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert keyed(server, "k" * 256).status_code == 400


@pytest.fixture
def shared(tiny: Path, postgres: PostgresServer, tmp_path: Path) -> Iterator[Running]:
    options = ("--state-store", postgres.url, "--state-store-schema", f"test_{secrets.token_hex(8)}")
    server = start(tiny, tmp_path / "copies", *options, "--state-store-timeout-s", "1")
    yield server
    server.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_answer_is_told_though_the_store_is_away_at_its_end(shared: Running, postgres: PostgresServer) -> None:
    answers: list[dict[str, Any]] = []
    long: dict[str, Any] = {"temperature": 0, "max_tokens": 60_000, "ignore_eos": True, "return_state": True}
    ask = {**ASK, "max_output_tokens": 24_000}  # long enough for the gauge, told once a second, to see all four running
    threads = [
        threading.Thread(target=lambda: answers.append(shared.complete("On", **long))),
        threading.Thread(target=lambda: answers.append(shared.chat(("user", "On"), **long))),
        threading.Thread(target=lambda: answers.append(shared.post("/v1/responses", **ask))),
    ]
    for thread in threads:
        thread.start()
    started = shared.post("/v1/responses", **ask, background=True)["id"]
    until(lambda: shared.gauge("dijiang_num_requests_running") == 4)
    with postgres.hanging():
        assert shared.refused("GET", f"/v1/responses/{started}")[:2] == (503, "state_store_unavailable")
        assert shared.gauge("dijiang_state_store_up") == 0
        for thread in threads:
            thread.join(PATIENCE_S)
        assert len(answers) == 3
        for answer in answers:
            assert answer["state_error"]["code"] == "state_store_unavailable"
            assert answer.get("state_id") is None
    until(lambda: shared.gauge("dijiang_state_store_up") == 1)
    response = ended(shared, started)
    text = next(text_of(answer) for answer in answers if "output" in answer)
    assert (response["status"], text_of(response)) == ("incomplete", text)
