"""Calls that must be made, through the real service with a random model: their arguments always parse, and fit."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.e2e.serving import Server, serving
from tests.tiny_models import write_tiny_model

HELLO: list[Any] = [{"role": "user", "content": "Weather?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 6},
                "unit": {"$ref": "#/$defs/unit"},
                "days": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 7}, "maxItems": 3},
            },
            "required": ["city", "unit", "days"],
            "additionalProperties": False,
            "$defs": {"unit": {"enum": ["C", "F"]}},
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}


class Lookup(pydantic.BaseModel):
    key: str = pydantic.Field(max_length=5)
    table: Literal["users", "orders"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    with serving(folder, "--max-conversations", "16") as running:
        yield running


def ask(server: Server, **fields: Any) -> Any:
    arguments = {"messages": HELLO, "tools": [WEATHER, TIME], "temperature": 1, "max_tokens": 3000, **fields}
    return server.client.chat.completions.create(model=server.model, **arguments)


def check(call: Any) -> None:
    assert call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_time":
        assert arguments == {}
        return
    assert call.function.name == "get_weather"
    assert list(arguments) == ["city", "unit", "days"]
    assert len(arguments["city"]) <= 6
    assert arguments["unit"] in ("C", "F")
    assert all(1 <= day <= 7 for day in arguments["days"])


def test_required_calls_are_always_valid(server: Server) -> None:
    def call(seed: int) -> Any:
        return ask(server, tool_choice="required", seed=seed).choices[0]

    with ThreadPoolExecutor(8) as threads:
        choices = list(threads.map(call, range(24)))
    for choice in choices:
        assert choice.message.content is None
        assert choice.message.tool_calls
        if choice.finish_reason == "tool_calls":
            for made in choice.message.tool_calls:
                check(made)
    names = {made.function.name for choice in choices for made in choice.message.tool_calls}
    assert names == {"get_weather", "get_time"}
    assert any(len(choice.message.tool_calls) > 1 for choice in choices)
    assert sum(choice.finish_reason == "tool_calls" for choice in choices) > 12


def test_a_named_tool_is_called_once(server: Server) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    for seed in range(6):
        [choice] = ask(server, tool_choice=named, seed=seed).choices
        [call] = choice.message.tool_calls
        assert (choice.finish_reason, call.function.name) == ("tool_calls", "get_weather")
        check(call)


def test_calls_one_at_a_time_are_one(server: Server) -> None:
    for seed in range(6):
        choice = ask(server, tool_choice="required", parallel_tool_calls=False, seed=seed).choices[0]
        [call] = choice.message.tool_calls
        check(call)


def test_a_stream_of_forced_calls_says_the_same_as_the_whole_answer(server: Server) -> None:
    for seed in range(3):
        fields = {"tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
        [whole] = ask(server, **fields).choices[0].message.tool_calls
        chunks = list(ask(server, stream=True, **fields))
        pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        assert "".join(piece.function.arguments or "" for piece in pieces) == whole.function.arguments
        assert [piece.function.name for piece in pieces if piece.function.name] == [whole.function.name]
        assert not any(chunk.choices[0].delta.content for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_answers_beside_tools_follow_the_response_format(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    kinds = set()
    for seed in range(12):
        message = ask(server, response_format=form, parallel_tool_calls=False, seed=seed).choices[0].message
        kinds.add("calls" if message.tool_calls else "content")
        if message.tool_calls:
            check(message.tool_calls[0])
        else:
            assert json.loads(message.content)["ok"] in (True, False)
    assert kinds == {"calls", "content"}


def test_strict_tools_leave_free_text_free(server: Server) -> None:
    """A random model hardly ever writes the mark of a call by chance; what it writes is text of any kind."""
    [choice] = ask(server, max_tokens=30, seed=3).choices
    assert choice.message.tool_calls is None
    assert choice.message.content


@pytest.mark.parametrize(
    ("tool", "choice"),
    [
        ({"name": "f", "strict": True, "parameters": {"type": "object", "not": {}}}, "auto"),
        ({"name": "f", "parameters": {"$ref": "https://example.com/s.json"}}, "required"),
    ],
)
def test_parameters_that_cannot_be_kept_to_are_a_400(server: Server, tool: dict[str, Any], choice: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, tools=[{"type": "function", "function": tool}], tool_choice=choice)
    assert caught.value.param == "tools"


def test_the_official_client_parses_calls_into_its_own_types(server: Server) -> None:
    answer = server.client.chat.completions.parse(
        model=server.model,
        messages=HELLO,
        tools=[openai.pydantic_function_tool(Lookup, name="lookup")],
        tool_choice={"type": "function", "function": {"name": "lookup"}},
        temperature=1,
        seed=1,
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Lookup)
