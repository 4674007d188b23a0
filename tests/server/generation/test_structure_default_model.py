"""Structured output of the default model, with its real tokenizer. Slow: a real model on the CPU."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dijiang_model.conversion.default_model import ensure_default_model
from server.engine.grammars.grammar import read_vocabulary
from server.text.tokenizer import load_tokenizer
from tests.e2e.serving import Server, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "job": {"enum": ["cook", "pilot", "poet"]},
        "born": {"type": "integer", "minimum": 1900, "maximum": 2020},
        "scores": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {"type": "number", "minimum": 0, "maximum": 10, "multipleOf": 0.5},
        },
        "home": {
            "type": "object",
            "properties": {"here": {"type": "boolean"}},
            "required": ["here"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "job", "born", "scores", "home"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(Path(ensure_default_model()), "--max-conversations", "16") as running:
        running.client = running.client.with_options(timeout=600)
        yield running


def ask(server: Server, content: str, **fields: Any) -> Any:
    messages: list[Any] = [{"role": "user", "content": content}]
    arguments = {"model": server.model, "messages": messages, **fields}
    return server.client.chat.completions.create(**arguments).choices[0]


def test_the_vocabulary_is_read_as_the_text_layer_reads_it() -> None:
    folder = Path(ensure_default_model())
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert read_vocabulary(folder / "tokenizer.json") == tokenizer.vocabulary


def test_a_nested_schema_is_kept_100_times_of_100_with_16_at_a_time(server: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}

    def describe(seed: int) -> dict[str, Any]:
        choice = ask(
            server, "Describe a person as JSON.", response_format=form, temperature=1, seed=seed, max_tokens=500
        )
        assert choice.finish_reason == "stop"
        person = json.loads(choice.message.content)
        assert isinstance(person, dict)
        return person

    with ThreadPoolExecutor(16) as threads:
        people = list(threads.map(describe, range(100)))
    for person in people:
        assert list(person) == list(PERSON["properties"])
        assert 1 <= len(person["name"]) <= 20
        assert person["job"] in ("cook", "pilot", "poet")
        assert type(person["born"]) is int
        assert 1900 <= person["born"] <= 2020
        assert 1 <= len(person["scores"]) <= 2
        assert all(0 <= score <= 10 and score % 0.5 == 0 for score in person["scores"])
        assert type(person["home"]["here"]) is bool


def test_a_choice_is_what_the_model_would_rather_say(server: Server) -> None:
    sentences = [f"The capital of France is {city}." for city in ("Berlin", "Paris", "Madrid")]
    form = {"structured_outputs": {"choice": sentences}}
    choice = ask(server, "What is the capital of France?", temperature=0, extra_body=form)
    assert (choice.message.content, choice.finish_reason) == (sentences[1], "stop")


def test_a_forced_call_has_sensible_arguments(server: Server) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 30}},
        "required": ["city"],
        "additionalProperties": False,
    }
    function = {"name": "get_weather", "description": "Weather of a city", "parameters": parameters}
    choice = ask(
        server,
        "What is the weather in Oslo?",
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
    )
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert "Oslo" in json.loads(call.function.arguments)["city"]
