"""Tools and items of the Responses API with a scripted engine: what the model is told, and what becomes of it."""

import json
from typing import Any

import openai
import pytest

from tests.server.conftest import Loopback
from tests.server.fake_engine import EOS_TOKEN_ID
from tests.server.tools.test_tools import CALL, SECOND, prompt_of, say

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
TIME: dict[str, Any] = {"type": "function", "name": "get_time", "parameters": None, "strict": False}
CALLED = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Oslo"}'}
COLD = {"type": "function_call_output", "call_id": "c1", "output": "cold"}


def ask(server: Loopback, said: Any = "Weather?", **fields: Any) -> Any:
    return server.openai.responses.create(model="org/tiny", input=said, **{"tools": [WEATHER, TIME], **fields})


def test_calls_are_items_of_their_own(server: Loopback) -> None:
    say(server, f"Let me see.\n{CALL}\n{SECOND}")
    response = ask(server)
    message, first, second = response.output
    assert (message.type, message.status, message.content[0].text) == ("message", "completed", "Let me see.")
    assert (first.type, first.name, json.loads(first.arguments)) == ("function_call", "get_weather", {"city": "Oslo"})
    assert (second.name, second.arguments, second.status) == ("get_time", "{}", "completed")
    assert first.id.startswith("fc_")
    assert first.call_id.startswith("call_")
    assert first.call_id != second.call_id
    assert [tool.name for tool in response.tools] == ["get_weather", "get_time"]
    assert (response.tool_choice, response.parallel_tool_calls, response.status) == ("auto", True, "completed")


def test_an_answer_of_calls_alone_has_no_message(server: Loopback) -> None:
    say(server, CALL)
    assert [item.type for item in ask(server).output] == ["function_call"]
    say(server, "")
    [message] = ask(server).output
    assert (message.type, message.content[0].text) == ("message", "")


def test_without_tools_calls_are_text(server: Loopback) -> None:
    say(server, CALL)
    for fields in ({"tools": []}, {"tool_choice": "none"}):
        assert ask(server, **fields).output_text == CALL


def test_events_tell_of_calls_in_order(server: Loopback) -> None:
    say(server, f"Let me see. {CALL}{SECOND}")
    events = list(ask(server, stream=True))
    assert [event.sequence_number for event in events] == [*range(len(events))]
    names = [event.type.removeprefix("response.") for event in events]
    kinds = [name for number, name in enumerate(names) if "delta" not in name or name != names[number - 1]]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *call,
        *call,
        "completed",
    ]
    items = events[-1].response.output
    for index, item in enumerate(items):
        mine = [event for event in events if getattr(event, "output_index", None) == index]
        assert {getattr(event, "item_id", item.id) for event in mine} == {item.id}
        assert mine[-1].item == item
        text = "".join(event.delta for event in mine if event.type.endswith(".delta"))
        assert text == (item.content[0].text if item.type == "message" else item.arguments)
    added = next(
        event.item for event in events if event.type == "response.output_item.added" and event.output_index == 1
    )
    assert (added.name, added.arguments, added.status) == ("get_weather", "", "in_progress")
    assert len([name for name in names if name == "function_call_arguments.delta"]) > 5


@pytest.mark.parametrize("text", [f"Hm. {CALL} {SECOND} so.", CALL[:-20], "plain \n", '<tool_call>{"name": "get', ""])
def test_a_stream_says_the_same_as_the_whole_answer(server: Loopback, text: str) -> None:
    say(server, text)
    whole, last = ask(server), list(ask(server, stream=True))[-1].response

    def told(response: Any) -> list[tuple[Any, ...]]:
        return [
            (item.type, item.status, item.content[0].text if item.type == "message" else (item.name, item.arguments))
            for item in response.output
        ]

    assert told(whole) == told(last)
    assert whole.usage == last.usage


def test_a_call_cut_by_the_limit_is_incomplete(server: Loopback) -> None:
    say(server, CALL)
    response = ask(server, max_output_tokens=70)
    [call] = response.output
    assert (response.status, call.status) == ("incomplete", "incomplete")
    assert '{"city": "Oslo"}'.startswith(call.arguments)


def test_calls_and_their_outputs_are_told_like_those_of_chat(server: Loopback) -> None:
    second = {**CALLED, "call_id": "c2"}
    parts = [{"type": "input_text", "text": "wet"}]
    items = [
        {"role": "user", "content": "Weather?"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hm.", "annotations": []}],
        },
        {**CALLED, "id": "fc_1", "status": "completed"},
        second,
        COLD,
        {**COLD, "call_id": "c2", "output": parts},
    ]
    ask(server, items, instructions="Be brief.")
    from_items = prompt_of(server)
    calls = [
        {"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
        for call_id in ("c1", "c2")
    ]
    server.openai.chat.completions.create(
        model="org/tiny",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "Hm.", "tool_calls": calls},  # type: ignore[list-item]
            {"role": "tool", "tool_call_id": "c1", "content": "cold"},
            {"role": "tool", "tool_call_id": "c2", "content": "wet"},
        ],
        tools=[
            {
                "type": "function",
                "function": {key: tool[key] for key in ("name", "description", "parameters") if key in tool},
            }
            for tool in (WEATHER, TIME)
        ],
    )
    assert from_items == prompt_of(server)


def test_what_was_thought_is_taken_and_told_where_there_is_a_place_for_it(server: Loopback) -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]}
    answer = {"role": "assistant", "content": "Hi"}
    question = {"role": "user", "content": "?"}
    ask(server, [question, thought, answer, question], tools=[])
    assert prompt_of(server) == "user\n?\nassistant\nHi\nuser\n?\nassistant\n"  # this template has none


def test_log_probabilities_are_not_asked_for_by_accident(server: Loopback) -> None:
    say(server, "Hi")
    [message] = ask(server, tools=[], include=["reasoning.encrypted_content"]).output
    assert message.content[0].logprobs == []
    assert server.engine.submitted[-1].logprobs.num_output is None
    body = {"input": "x", "include": ["message.output_text.logprobs"], "top_logprobs": 3}
    server.http.post("/v1/responses", json=body)
    assert server.engine.submitted[-1].logprobs.num_output == 3


def test_effort_and_summary_without_a_place_for_them_are_taken(server: Loopback) -> None:
    for effort in ("none", "high"):
        assert ask(server, reasoning={"effort": effort, "summary": "detailed"}, tools=[]).reasoning.effort == effort
    assert ask(server, reasoning={}, tools=[]).reasoning.effort is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "mcp", "server_label": "x", "server_url": "http://x"}]}, "tools"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{**WEATHER, "parameters": {"type": "array"}}]}, "tools[0].parameters"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"input": [COLD]}, "input"),
        ({"input": [CALLED, {**COLD, "call_id": "c2"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"type": "image_generation_call"}]}, "input"),
        ({"input": [{**COLD, "output": [{"type": "input_image", "image_url": "file:///etc/passwd"}]}]}, None),
        ({"input": [5]}, "input"),
        ({"input": [{"type": 5}]}, "input"),
        ({"input": [{**CALLED, "name": ""}]}, None),
        ({"include": ["everything"]}, "include"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"max_tool_calls": 0}, "max_tool_calls"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"stream_options": {}}, "stream_options"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_honoured_is_named(server: Loopback, fields: dict[str, Any], param: str | None) -> None:
    body = {"input": "x", "tools": [WEATHER], **fields}
    answer = server.http.post("/v1/responses", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == param or (param is None and error["param"].startswith("input"))
    assert not server.engine.submitted


def test_a_response_that_fails_keeps_what_was_said(server: Loopback) -> None:
    server.engine.script = lambda _: [*f"Hm. {CALL}".encode(), EOS_TOKEN_ID]
    server.engine.fail_after = 60
    events = list(ask(server, stream=True))
    assert events[-1].type == "response.failed"
    failed = events[-1].response
    assert failed.error.code == "engine_restarting"
    assert [(item.type, item.status) for item in failed.output] == [
        ("message", "completed"),
        ("function_call", "incomplete"),
    ]
    with pytest.raises(openai.InternalServerError):
        ask(server)
