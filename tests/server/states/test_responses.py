"""The Responses API as the official client sees it, on a real server with a tiny model."""

from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.states.running import BOB, Running, running, start
from tests.waiting import until

OPTIONS: dict[str, Any] = {"temperature": 0, "max_output_tokens": 12}
TALK = "Tell me about the sea, the ships, the wind and the long way home."


def create(server: Running, said: Any = TALK, **more: Any) -> Any:
    return server.client.responses.create(model="tiny", input=said, **{**OPTIONS, **more})


def until_ended(server: Running, response_id: str) -> Any:
    until(lambda: server.client.responses.retrieve(response_id).status not in ("queued", "in_progress"))
    return server.client.responses.retrieve(response_id)


def test_an_answer_has_the_form_that_the_client_expects(server: Running) -> None:
    said = f"Nobody has said this before. {TALK}"
    response = create(server, said, instructions="Be brief.", metadata={"a": "b"})
    assert (response.object, response.status, response.model) == ("response", "incomplete", "tiny")
    assert response.incomplete_details.reason == "max_output_tokens"
    (message,) = response.output
    assert (message.type, message.role, message.content[0].type) == ("message", "assistant", "output_text")
    assert response.output_text == message.content[0].text
    assert (response.instructions, response.metadata) == ("Be brief.", {"a": "b"})
    assert response.usage.output_tokens == 12
    assert response.usage.total_tokens == response.usage.input_tokens + 12
    assert response.usage.input_tokens_details.cached_tokens == 0


def test_it_says_what_chat_says(server: Running) -> None:
    chat = server.chat(("system", "Be brief."), ("user", TALK), max_tokens=12)
    assert create(server, instructions="Be brief.").output_text == chat["message"]["content"]
    parts = [{"role": "user", "content": [{"type": "input_text", "text": TALK}]}]
    assert create(server, parts, instructions="Be brief.").output_text == chat["message"]["content"]


def test_a_following_response_costs_only_what_is_new(server: Running) -> None:
    first = create(server)
    before = server.gauge("dijiang_engine_prefill_tokens_total")
    second = create(server, "And then?", previous_response_id=first.id)
    past = first.usage.input_tokens + first.usage.output_tokens
    new = second.usage.input_tokens - past
    assert second.usage.input_tokens_details.cached_tokens == past - 1
    assert server.gauge("dijiang_engine_prefill_tokens_total") - before == new + 1
    assert second.previous_response_id == first.id
    kept = server.chat(("user", TALK), max_tokens=12, return_state=True)
    assert server.chat(("user", "And then?"), state_id=kept["state_id"], max_tokens=12)["message"]["content"] == (
        second.output_text
    )


def test_branches_of_one_response_do_not_disturb_each_other(server: Running) -> None:
    first = create(server)
    left, right = (create(server, text, previous_response_id=first.id) for text in ("Left", "Right"))
    assert create(server, "Left", previous_response_id=first.id).output_text == left.output_text
    third = create(server, "More", previous_response_id=right.id)
    assert third.usage.input_tokens > right.usage.total_tokens


def test_events_come_in_order_and_carry_the_same_text(server: Running) -> None:
    whole = create(server)
    events = list(create(server, stream=True))
    assert [event.sequence_number for event in events] == [*range(len(events))]
    names = [event.type for event in events]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert names[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert {*names[4:-4]} == {"response.output_text.delta"}
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-4].text == events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    assert server.client.responses.retrieve(events[-1].response.id).output_text == whole.output_text


def test_the_clients_stream_helper_understands_the_events(server: Running) -> None:
    with server.client.responses.stream(model="tiny", input=TALK, **OPTIONS) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == create(server).output_text


def test_a_response_is_read_again_and_deleted(server: Running) -> None:
    first = create(server)
    assert server.client.responses.retrieve(first.id) == first
    items = server.client.responses.input_items.list(first.id).data
    assert [(item.role, item.content[0].text) for item in items] == [("user", TALK)]
    server.client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.responses.retrieve(first.id)
    assert caught.value.code == "response_not_found"
    with pytest.raises(openai.NotFoundError) as caught:
        create(server, previous_response_id=first.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


def test_later_responses_outlive_the_one_they_went_on_from(server: Running) -> None:
    first = create(server)
    second = create(server, "More", previous_response_id=first.id)
    server.client.responses.delete(first.id)
    assert create(server, "More", previous_response_id=second.id).usage.input_tokens > second.usage.total_tokens


def test_what_is_not_stored_is_not_there(server: Running) -> None:
    response = create(server, store=False)
    assert response.store is False
    for call in (server.client.responses.retrieve, server.client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            call(response.id)


def test_another_key_sees_nothing(server: Running) -> None:
    first = create(server)
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        body = {"json": {}} if method == "POST" else {}
        assert server.refused(method, f"/v1/responses/{first.id}{path}", BOB, **body)[:2] == (404, "response_not_found")
    body = {"input": "x", "previous_response_id": first.id}
    assert server.refused("POST", "/v1/responses", BOB, json=body)[:2] == (404, "previous_response_not_found")


def test_a_response_in_the_background_is_read_when_it_is_ready(server: Running) -> None:
    whole = create(server)
    started = create(server, background=True)
    assert (started.status, started.background, started.output) == ("queued", True, [])
    ended = until_ended(server, started.id)
    assert (ended.status, ended.output_text) == ("incomplete", whole.output_text)
    assert create(server, "More", previous_response_id=ended.id).usage.input_tokens > whole.usage.total_tokens


def test_a_response_in_the_background_is_cancelled(server: Running) -> None:
    text = [{"role": "user", "content": TALK}]
    started = create(server, text, background=True, max_output_tokens=1_000_000)
    cancelled = server.client.responses.cancel(started.id)
    assert cancelled.status in ("cancelled", "completed")  # it may have said its last word before
    assert server.client.responses.retrieve(started.id).status == cancelled.status
    until(lambda: server.gauge("dijiang_num_requests_running") == 0)


def test_only_background_responses_are_cancelled(server: Running) -> None:
    first = create(server)
    with pytest.raises(openai.BadRequestError):
        server.client.responses.cancel(first.id)


def test_structured_text(server: Running) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    text = {"format": {"type": "json_schema", "name": "answer", "schema": schema}}
    response = create(server, text=text, max_output_tokens=100)
    assert response.status == "completed"
    assert response.output_text.replace(" ", "").replace("\n", "") in ('{"n":1}', '{"n":2}')


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]}, None),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "x", "reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"input": "x", "n": 2}, "n"),
        ({"input": "x", "max_tokens": 2}, "max_tokens"),
        ({"input": "x", "response_format": {"type": "json_object"}}, "response_format"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "background": True, "store": False}, "background"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format"),
        ({"input": "x", "temperature": 9}, "temperature"),
        ({"input": "x", "model": "gpt-x"}, "model"),
    ],
)
def test_what_cannot_be_honoured_is_named(server: Running, body: dict[str, Any], param: str | None) -> None:
    status, _, named = server.refused("POST", "/v1/responses", json=body)
    assert status in (400, 404)
    assert named == param or (param is None and named is not None)


def test_a_conversation_goes_on_after_everything_was_killed(tiny: Path, tmp_path: Path) -> None:
    first_server = start(tiny, tmp_path / "states")
    try:
        first = create(first_server)
        undisturbed = create(first_server, "And then?", previous_response_id=first.id)
        half = create(first_server, background=True, max_output_tokens=1_000_000)
    finally:
        first_server.kill()
        first_server.close()
    with running(tiny, tmp_path / "states") as server:
        second = create(server, "And then?", previous_response_id=first.id)
        assert second.output_text == undisturbed.output_text
        assert second.usage == undisturbed.usage
        # It was made in the background, so it is made anew.
        assert server.client.responses.retrieve(half.id).status in ("queued", "in_progress")
        assert server.client.responses.cancel(half.id).status == "cancelled"


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("metadata", {f"k{number}": "v" for number in range(17)}, "metadata"),
        ("metadata", {"k" * 65: "v"}, "metadata"),
        ("metadata", {"k": "v" * 513}, "metadata"),
        ("user", "u" * 513, "user"),
        ("text", {"format": {"type": "text", "padding": "x" * (1 << 20)}}, "text.format"),
        ("tools", [{"type": "function", "name": "f", "description": "x" * (1 << 20)}], "tools"),
    ],
)
def test_what_comes_back_with_a_response_has_a_length(server: Running, field: str, value: object, param: str) -> None:
    status, _, told = server.refused("POST", "/v1/responses", json={"input": "x", field: value})
    assert status == 400
    assert told is not None
    assert told.startswith(param)


def test_what_comes_back_with_a_response_may_have_that_length(server: Running) -> None:
    metadata = {f"{number:064d}": "v" * 512 for number in range(16)}
    answer = server.post("/v1/responses", input="x", metadata=metadata, user="u" * 512, max_output_tokens=1)
    assert (answer["metadata"], answer["user"]) == (metadata, "u" * 512)
