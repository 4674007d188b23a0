"""Streams of stored responses told again, and of responses in the background, on a real server with a tiny model."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.states.running import ANN, BOB, Running, bearer, running
from tests.tiny_models import write_tiny_model
from tests.waiting import until

PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Tokyo"]}, "size": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "size"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {"type": "function", "name": "look_up", "parameters": PLACE, "strict": True}
SAID: dict[str, Any] = {"input": "Tell me about the sea.", "temperature": 0, "max_output_tokens": 12}
FORCED: dict[str, Any] = {**SAID, "tools": [TOOL], "tool_choice": "required", "max_output_tokens": 300}
SCORED: dict[str, Any] = {**SAID, "include": ["message.output_text.logprobs"], "top_logprobs": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    with running(folder, tmp_path_factory.mktemp("states") / "one") as server:
        yield server


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    blocks = [block for block in response.text.split("\n\n") if block.startswith("event: ")]
    events = [json.loads(block.partition("\ndata: ")[2]) for block in blocks]
    assert [block.partition("\n")[0].removeprefix("event: ") for block in blocks] == [event["type"] for event in events]
    return events


def stream(server: Running, **body: Any) -> list[dict[str, Any]]:
    return events_of(server.http.post("/v1/responses", json={**body, "stream": True}))


def again(server: Running, response_id: str, **query: Any) -> list[dict[str, Any]]:
    return events_of(server.http.get(f"/v1/responses/{response_id}", params={"stream": "true", **query}))


@pytest.mark.parametrize("body", [SAID, FORCED, SCORED], ids=["text", "calls", "log-probabilities"])
def test_a_stored_response_is_streamed_again_event_by_event(server: Running, body: dict[str, Any]) -> None:
    events = stream(server, **body)
    response_id = events[-1]["response"]["id"]
    assert again(server, response_id) == events
    for number in (0, 3, len(events) - 2, len(events) - 1, 10_000):
        assert again(server, response_id, starting_after=number) == events[number + 1 :]
    stored = server.get(f"/v1/responses/{response_id}")
    assert stored == events[-1]["response"]
    assert not any(name.startswith("_") for name in stored)


def test_a_whole_response_is_streamed_like_any_other(server: Running) -> None:
    whole = server.post("/v1/responses", **SAID)
    events = again(server, whole["id"])
    assert events[-1] == {"type": "response.incomplete", "sequence_number": len(events) - 1, "response": whole}
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"]


def test_log_probabilities_cover_every_token(server: Running) -> None:
    part = server.post("/v1/responses", **SCORED)["output"][0]["content"][0]
    chat = server.post(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": SAID["input"]}],
        temperature=0,
        max_tokens=12,
        logprobs=True,
        top_logprobs=2,
    )["choices"][0]
    assert part["text"] == chat["message"]["content"]
    values = [entry["logprob"] for entry in part["logprobs"]]
    assert values == pytest.approx([entry["logprob"] for entry in chat["logprobs"]["content"]], abs=1e-5)
    assert {len(entry["top_logprobs"]) for entry in part["logprobs"]} == {2}


def test_a_stream_in_the_background_goes_on_without_its_reader(server: Running) -> None:
    body = {**SAID, "max_output_tokens": 400, "background": True, "stream": True, "text": LONG}
    with server.http.stream("POST", "/v1/responses", json=body) as response:
        lines = response.iter_lines()
        first = next(json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))
    response_id = first["response"]["id"]
    assert first["response"]["background"] is True
    rest = again(server, response_id, starting_after=0)
    assert [event["sequence_number"] for event in rest] == [*range(1, len(rest) + 1)]
    assert rest[-1]["response"]["status"] in ("incomplete", "completed")
    # Now it is told from the store.
    wait_for_end(server, response_id)
    assert again(server, response_id) == [first, *rest]
    undisturbed = server.post("/v1/responses", **{**SAID, "max_output_tokens": 400, "text": LONG})
    assert rest[-1]["response"]["output"][0]["content"] == undisturbed["output"][0]["content"]


LONG = {
    "format": {"type": "json_schema", "name": "n", "schema": {"type": "string", "minLength": 300, "maxLength": 390}}
}
"""A random model may end by itself after a token; this keeps it talking."""


def wait_for_end(server: Running, response_id: str) -> dict[str, Any]:
    until(lambda: server.get(f"/v1/responses/{response_id}")["status"] != "in_progress")
    return server.get(f"/v1/responses/{response_id}")


def test_a_cancelled_response_ends_its_streams(server: Running) -> None:
    text = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "string", "minLength": 100_000}}}
    body = {**SAID, "max_output_tokens": 100_000, "background": True, "text": text}
    response_id = server.post("/v1/responses", **body)["id"]
    path = f"/v1/responses/{response_id}?stream=true"
    with server.http.stream("GET", path) as response:
        told = (json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line.startswith("data: "))
        seen = [next(told) for _ in range(8)]
        cancelled = server.http.post(f"/v1/responses/{response_id}/cancel").json()
        seen += told
    assert cancelled["status"] == "cancelled"
    assert seen[-1]["type"] == "response.cancelled"
    assert (
        "".join(event["delta"] for event in seen if event["type"] == "response.output_text.delta")
        == (cancelled["output"][0]["content"][0]["text"])
    )
    assert again(server, response_id) == seen


def test_input_items_come_in_pages(server: Running) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "look_up", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": "done"}
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm"}]}
    said = [{"role": "user", "content": "Hi"}, thought, call, output]
    response_id = server.post("/v1/responses", **{**SAID, "input": said})["id"]
    path = f"/v1/responses/{response_id}/input_items"
    assert [item["type"] for item in server.get(path)["data"]] == [
        "function_call_output",
        "function_call",
        "reasoning",
        "message",
    ]
    first = server.get(f"{path}?order=asc&limit=2")
    assert ([item["type"] for item in first["data"]], first["has_more"]) == (["message", "reasoning"], True)
    second = server.get(f"{path}?order=asc&limit=2&after={first['last_id']}")
    assert [{key: item[key] for key in said} for item, said in zip(second["data"], (call, output), strict=True)] == [
        call,
        output,
    ]
    assert second["has_more"] is False
    typed = server.client.responses.input_items.list(response_id, order="asc", limit=1)
    assert [item.type for item in typed] == ["message", "reasoning", "function_call", "function_call_output"]
    assert server.refused("GET", f"{path}?after=nothing")[2] == "after"
    assert server.refused("GET", f"{path}?limit=0")[2] == "limit"


def test_tools_that_come_later_are_told_in_a_message_of_their_own(server: Running) -> None:
    first = server.post("/v1/responses", **SAID)
    plain = server.post("/v1/responses", **{**SAID, "previous_response_id": first["id"], "input": "And?"})
    tooled = {**FORCED, "previous_response_id": first["id"], "input": "And?"}
    second = server.post("/v1/responses", **tooled)
    assert second["usage"]["input_tokens"] > plain["usage"]["input_tokens"] + 300  # bytes of the tool in words
    call = second["output"][0]
    assert json.loads(call["arguments"])["city"] in ("Paris", "Tokyo")
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "far"}
    third = server.post("/v1/responses", **{**FORCED, "previous_response_id": second["id"], "input": [output]})
    past = second["usage"]["total_tokens"]
    assert third["usage"]["input_tokens"] < past + 100  # the same tools are not told once more
    assert third["usage"]["input_tokens_details"]["cached_tokens"] >= past - 1


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("starting_after=1", "starting_after"),
        ("stream=true&starting_after=-1", "starting_after"),
        ("stream=x", "stream"),
    ],
)
def test_bad_queries_are_named(server: Running, query: str, param: str) -> None:
    response_id = server.post("/v1/responses", **SAID)["id"]
    status, _, named = server.refused("GET", f"/v1/responses/{response_id}?{query}")
    assert status == 400
    assert named == param


def test_nobody_else_can_follow(server: Running) -> None:
    response_id = server.post("/v1/responses", **SAID)["id"]
    assert server.refused("GET", f"/v1/responses/{response_id}?stream=true", BOB)[0] == 404
    gone = server.http.get("/v1/responses/resp_0?stream=true", headers=bearer(ANN))
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "response_not_found")
