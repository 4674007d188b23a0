"""SIGTERM while responses are made: those in the background go on by themselves elsewhere or later, word for word."""

import json
import secrets
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.api.test_responses_streams import events_of
from tests.server.states.postgres_server import PostgresServer
from tests.server.states.running import ANN, BOB, Running, running, start
from tests.server.states.test_shutdown import Asking, stop
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.slow
OPTIONS = ("--drain-timeout-s", "0.1", "--max-conversations", "4", "--speculate", "0")
"""Without guesses, which would end an answer of a model that repeats itself before the signal arrives."""
WORDS = {"type": "string", "minLength": 1800, "maxLength": 1900}
FORM = {"format": {"type": "json_schema", "name": "n", "schema": WORDS}}
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "note",
    "parameters": {"type": "object", "properties": {"it": WORDS}, "required": ["it"], "additionalProperties": False},
    "strict": True,
}
SAID: dict[str, Any] = {"input": "Tell me about the sea.", "temperature": 0, "max_output_tokens": 1500}
FOR_EVER = {**SAID, "input": "Hi", "max_output_tokens": 1_000_000}
KINDS: dict[str, dict[str, Any]] = {
    "form": {**SAID, "text": FORM},
    "call": {**SAID, "tools": [TOOL], "tool_choice": "required"},
    "log-probabilities": {**SAID, "text": FORM, "include": ["message.output_text.logprobs"], "top_logprobs": 1},
}


def said(response: dict[str, Any]) -> list[Any]:
    """The output without what is drawn by lot."""
    return [
        {name: value for name, value in item.items() if name not in ("id", "call_id")} for item in response["output"]
    ]


def until_ended(server: Running, response_id: str, key: str = ANN) -> dict[str, Any]:
    until(lambda: server.get(f"/v1/responses/{response_id}", key)["status"] not in ("queued", "in_progress"))
    return server.get(f"/v1/responses/{response_id}", key)


def events_at(server: Running, response_id: str, **query: Any) -> list[dict[str, Any]]:
    return events_of(server.http.get(f"/v1/responses/{response_id}", params={"stream": "true", **query}))


def read_so_far(asking: Asking) -> list[dict[str, Any]]:
    asking.join(PATIENCE_S)
    return [json.loads(line.removeprefix("data: ")) for line in asking.lines if line.startswith("data: ")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_in_the_background_goes_on_after_the_restart_as_if_undisturbed(
    tiny: Path, tmp_path: Path, kind: str
) -> None:
    body = KINDS[kind]
    server = start(tiny, tmp_path / "states", *OPTIONS)
    try:
        undisturbed = server.post("/v1/responses", **body)
        reading = Asking(server, "/v1/responses", {**body, "background": True, "stream": True})
        until(lambda: len(reading.lines) > 40)
        stop(server)
    finally:
        server.kill()
        server.close()
    *before, error = read_so_far(reading)
    response_id = before[0]["response"]["id"]
    assert (error["type"], error["code"]) == ("error", "server_shutdown")
    assert error["sequence_number"] == before[-1]["sequence_number"] == len(before) - 1
    with running(tiny, tmp_path / "states") as again:
        rest = events_at(again, response_id, starting_after=error["sequence_number"])
        assert [event["sequence_number"] for event in before + rest] == [*range(len(before) + len(rest))]
        ended = until_ended(again, response_id)
        assert rest[-1] == {**rest[-1], "response": ended}
        assert (ended["status"], said(ended)) == (undisturbed["status"], said(undisturbed))
        assert ended["usage"]["output_tokens"] == undisturbed["usage"]["output_tokens"]
        assert ended["usage"]["input_tokens"] == undisturbed["usage"]["input_tokens"]
        assert not any(name.startswith("_") for name in ended)
        replayed = events_at(again, response_id)
        assert replayed == before + rest
        follow = {"input": "And then?", "temperature": 0, "max_output_tokens": 8}
        after = again.post("/v1/responses", **follow, previous_response_id=response_id)
        assert after["usage"]["input_tokens"] > ended["usage"]["total_tokens"]
    with running(tiny, tmp_path / "states") as third:  # told again after one more restart, from the store alone
        assert events_at(third, response_id) == replayed


def test_one_that_had_not_begun_goes_on_too_and_after_another_response(tiny: Path, tmp_path: Path) -> None:
    server = start(tiny, tmp_path / "states", "--drain-timeout-s", "0.1", "--max-conversations", "1")
    try:
        first = server.post("/v1/responses", input="My name is Ann.", temperature=0, max_output_tokens=8)
        body = {**KINDS["form"], "previous_response_id": first["id"]}
        undisturbed = server.post("/v1/responses", **body)
        busy = server.post("/v1/responses", **body, background=True)
        waits = server.post("/v1/responses", **body, background=True)
        stop(server)
    finally:
        server.kill()
        server.close()
    with running(tiny, tmp_path / "states") as again:
        for response in (busy, waits):
            ended = until_ended(again, response["id"])
            assert (ended["status"], said(ended)) == (undisturbed["status"], said(undisturbed))
            assert ended["usage"] == undisturbed["usage"]
            assert ended["previous_response_id"] == first["id"]


def test_one_that_is_suspended_is_cancelled_and_deleted_like_any_other(tiny: Path, tmp_path: Path) -> None:
    server = start(tiny, tmp_path / "states", *OPTIONS)
    try:
        one, two = (server.post("/v1/responses", **KINDS["form"], background=True)["id"] for _ in range(2))
        stop(server)
    finally:
        server.kill()
        server.close()
    with running(tiny, tmp_path / "states") as again:
        assert again.post(f"/v1/responses/{one}/cancel")["status"] in ("cancelled", "completed")
        assert again.http.delete(f"/v1/responses/{two}").status_code == 200
        assert again.refused("GET", f"/v1/responses/{two}")[0] == 404
        assert again.refused("GET", f"/v1/responses/{one}", BOB)[0] == 404


def test_a_response_that_is_waited_for_is_incomplete_and_can_be_gone_on_from(tiny: Path, tmp_path: Path) -> None:
    server = start(tiny, tmp_path / "states", *OPTIONS)
    try:
        streamed = Asking(server, "/v1/responses", {**FOR_EVER, "stream": True})
        whole = Asking(server, "/v1/responses", FOR_EVER, BOB)
        until(lambda: len(streamed.lines) > 100 and server.gauge("dijiang_num_requests_running") == 2)
        stop(server)
    finally:
        server.kill()
        server.close()
    last, answer = read_so_far(streamed)[-1], whole.answer()
    assert (whole.status, last["type"]) == (200, "response.incomplete")
    with running(tiny, tmp_path / "states") as again:
        for response, key in ((last["response"], ANN), (answer, BOB)):
            assert response["incomplete_details"] == {"reason": "server_shutdown"}
            assert response["output"][0]["status"] == "incomplete"
            assert len(response["output"][0]["content"][0]["text"]) > 20
            assert again.get(f"/v1/responses/{response['id']}", key) == response
            ask = {"input": "Go on.", "temperature": 0, "max_output_tokens": 8}
            after = again.post("/v1/responses", key, **ask, previous_response_id=response["id"])
            assert after["usage"]["input_tokens"] > response["usage"]["total_tokens"]
            assert after["usage"]["input_tokens_details"]["cached_tokens"] >= response["usage"]["total_tokens"] - 1


def test_the_official_client_reads_on_at_the_next_server(tiny: Path, tmp_path: Path) -> None:
    server = start(tiny, tmp_path / "states", *OPTIONS)
    try:
        events = server.client.responses.create(model="tiny", background=True, stream=True, **KINDS["form"])
        seen = [next(events) for _ in range(50)]
        server.process.send_signal(15)
        seen += events
    finally:
        server.process.wait(PATIENCE_S)
        server.kill()
        server.close()
    assert seen[-1].type == "error"
    assert isinstance(seen[0], openai.types.responses.ResponseCreatedEvent)
    with running(tiny, tmp_path / "states") as again:
        response_id = seen[0].response.id
        rest = [*again.client.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number)]
        text = "".join(event.delta for event in seen + rest if event.type == "response.output_text.delta")
        assert rest[-1].response.output_text == text


def test_another_replica_takes_it_up_and_tells_it_from_its_beginning(
    tiny: Path, postgres: PostgresServer, tmp_path: Path
) -> None:
    shared = ("--state-store", postgres.url, "--state-store-schema", f"test_{secrets.token_hex(8)}")
    with running(tiny, tmp_path / "one", *shared) as one:
        two = start(tiny, tmp_path / "two", *shared, *OPTIONS)
        try:
            undisturbed = one.post("/v1/responses", **KINDS["call"])
            reading = Asking(two, "/v1/responses", {**KINDS["call"], "background": True, "stream": True})
            until(lambda: len(reading.lines) > 100)
            response_id = json.loads(reading.lines[1].removeprefix("data: "))["response"]["id"]
            elsewhere = Asking(one, "/v1/completions", {"prompt": "x"})  # the other server works meanwhile
            assert one.get(f"/v1/responses/{response_id}")["status"] == "in_progress"
            stop(two)
            elsewhere.join(PATIENCE_S)
        finally:
            two.kill()
            two.close()
        *before, error = read_so_far(reading)
        assert error["code"] == "server_shutdown"
        ended = until_ended(one, response_id)
        assert (ended["status"], said(ended)) == (undisturbed["status"], said(undisturbed))
        told = events_at(one, response_id)
        assert told[: len(before)] == before
        with running(tiny, tmp_path / "three", *shared) as three:  # it has never seen the response
            assert events_at(three, response_id) == told
            assert events_at(three, response_id, starting_after=5) == told[6:]


def test_a_store_that_is_away_when_the_server_stops_keeps_no_states_and_responses_are_made_anew(
    tiny: Path, postgres: PostgresServer, tmp_path: Path
) -> None:
    shared = ("--state-store", postgres.url, "--state-store-schema", f"test_{secrets.token_hex(8)}")
    server = start(tiny, tmp_path / "one", *shared, *OPTIONS)
    try:
        streamed = Asking(
            server, "/v1/completions", {"prompt": "x", "max_tokens": 100_000, "ignore_eos": True, "stream": True}
        )
        made = server.post("/v1/responses", **KINDS["form"], background=True)
        until(lambda: len(streamed.lines) > 20)
        postgres.stop()
        try:
            stop(server)
        finally:
            postgres.start()
        streamed.join(PATIENCE_S)
        error = json.loads(streamed.lines[-2].removeprefix("data: "))["error"]
        assert (error["code"], error["state_id"]) == ("server_shutdown", None)
    finally:
        server.kill()
        server.close()
    with running(tiny, tmp_path / "one", *shared) as again:  # it knows that the one before is gone
        until(lambda: again.get(f"/v1/responses/{made['id']}")["status"] not in ("queued", "in_progress"))
        assert again.get(f"/v1/responses/{made['id']}")["status"] in ("completed", "incomplete")
        assert again.get("/v1/states")["data"] == []
