"""Structured output through the real service, with a random model: whatever it wants to say, the answer fits."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.e2e.serving import Server, serving
from tests.tiny_models import write_tiny_model

ORDER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "customer": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 8},
                "tier": {"enum": ["basic", "gold", None]},
                "address": {"$ref": "#/$defs/address"},
            },
            "required": ["name", "tier", "address"],
            "additionalProperties": False,
        },
        "lines": {
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {
                    "sku": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
                    "count": {"type": "integer", "minimum": 1, "maximum": 99},
                    "price": {"type": "number", "minimum": 0, "maximum": 1000},
                    "gift": {"type": "boolean"},
                },
                "required": ["sku", "count", "price", "gift"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["customer", "lines"],
    "additionalProperties": False,
    "$defs": {
        "address": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Oslo", "Lima"]},
                "zip": {"type": "string", "minLength": 2, "maxLength": 4},
            },
            "required": ["city", "zip"],
            "additionalProperties": False,
        }
    },
}


class Step(pydantic.BaseModel):
    kind: Literal["add", "remove"]
    amount: int = pydantic.Field(ge=0, le=50)


class Plan(pydantic.BaseModel):
    title: str = pydantic.Field(max_length=6)
    steps: list[Step] = pydantic.Field(max_length=2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    with serving(folder, "--max-conversations", "16") as running:
        yield running


def check_order(text: str) -> None:
    """By hand, for the point is that nothing else decides what fits."""
    order = json.loads(text)
    assert list(order) == ["customer", "lines"]
    assert list(order["customer"]) == ["name", "tier", "address"]
    assert len(order["customer"]["name"]) <= 8
    assert order["customer"]["tier"] in ("basic", "gold", None)
    assert order["customer"]["address"]["city"] in ("Oslo", "Lima")
    assert 2 <= len(order["customer"]["address"]["zip"]) <= 4
    assert 1 <= len(order["lines"]) <= 3
    for line in order["lines"]:
        assert list(line) == ["sku", "count", "price", "gift"]
        assert re.fullmatch("[A-Z]{2}-[0-9]{3}", line["sku"])
        assert type(line["count"]) is int
        assert 1 <= line["count"] <= 99
        assert type(line["price"]) in (int, float)
        assert 0 <= line["price"] <= 1000
        assert type(line["gift"]) is bool


def json_schema(schema: dict[str, Any], *, strict: bool = True) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": strict}}


def chat(server: Server, **fields: Any) -> Any:
    arguments = {"model": server.model, "messages": [{"role": "user", "content": "Order!"}], "temperature": 1, **fields}
    return server.client.chat.completions.create(**arguments)


def complete(server: Server, structured: dict[str, Any] | None = None, **fields: Any) -> Any:
    extra = {} if structured is None else {"structured_outputs": structured}
    arguments = {"model": server.model, "prompt": "Say:", "max_tokens": 400, "temperature": 1, **fields}
    return server.client.completions.create(**arguments, extra_body=extra)


def test_a_nested_schema_is_kept_100_times_of_100_with_16_at_a_time(server: Server) -> None:
    def ask(seed: int) -> str:
        choice = chat(server, response_format=json_schema(ORDER), seed=seed, max_tokens=2000).choices[0]
        assert choice.finish_reason == "stop"
        return str(choice.message.content)

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, range(100)))
    for answer in answers:
        check_order(answer)
    assert len(set(answers)) == 100


def test_a_stream_carries_the_text_of_the_whole_answer(server: Server) -> None:
    for seed in range(3):
        fields = {"response_format": json_schema(ORDER), "seed": seed, "max_tokens": 2000}
        whole = chat(server, **fields).choices[0]
        chunks = list(chat(server, stream=True, **fields))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
        assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "stop"


def test_an_answer_that_reaches_the_limit_says_so(server: Server) -> None:
    choice = chat(server, response_format=json_schema(ORDER), max_tokens=10).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.content.startswith("{")


def test_json_objects_are_objects_or_beginnings_of_objects(server: Server) -> None:
    for seed in range(8):
        choice = chat(server, response_format={"type": "json_object"}, seed=seed, max_tokens=200).choices[0]
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.message.content.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("structured", "pattern"),
    [
        ({"regex": "[a-c]{3}-(x|y)+"}, "[a-c]{3}-(x|y)+"),
        ({"regex": "^naïve (日|本){2}$"}, "naïve (日|本){2}"),
        ({"choice": ["yes", "no", 'say "hm"']}, 'yes|no|say "hm"'),
        ({"grammar": 'root ::= "a" | "b" root "b"'}, "b*ab*"),
        ({"grammar": 'start: sum\nsum: DIGIT ("+" DIGIT)~1..3\nDIGIT: /[0-9]/'}, r"\d(\+\d){1,3}"),
        ({"json": {"enum": ["one", 2]}}, '"one"|2'),
        ({"json": '{"type": "integer", "minimum": 7, "maximum": 12}'}, "7|8|9|1[0-2]"),
    ],
    ids=str,
)
def test_each_language_is_kept_on_completions_and_chat(
    server: Server, structured: dict[str, Any], pattern: str
) -> None:
    answers = [complete(server, structured, seed=seed).choices[0].text for seed in range(5)]
    answers.append(chat(server, extra_body={"structured_outputs": structured}).choices[0].message.content)
    assert all(re.fullmatch(pattern, answer) for answer in answers), answers


def test_every_choice_of_a_request_keeps_to_its_grammar(server: Server) -> None:
    answer = complete(server, {"choice": ["left", "right"]}, n=8, seed=1)
    texts = [choice.text for choice in answer.choices]
    assert set(texts) == {"left", "right"}


def test_a_stop_string_ends_a_structured_answer_too(server: Server) -> None:
    assert complete(server, {"regex": "ab+c"}, stop="b").choices[0].text == "a"


def wide(letter: str) -> str:
    """A rule that is cheap to begin, and then has thousands of ways to go on."""
    return " | ".join(f'"{letter}{number:04}"' for number in range(5_000))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"response_format": json_schema({"type": "object", "not": {}})}, "response_format"),
    ({"response_format": json_schema({"$ref": "https://example.com/schema.json"})}, "response_format"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": "root ::= root"}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": "root ::= missing"}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a" * 300_000}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": f"start: a b\na: {wide('x')}\nb: {wide('y')}"}}, "structured_outputs"),
    ({"structured_outputs": {"json": {"type": "integer", "minimum": 2, "maximum": 1}}}, "structured_outputs"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_cannot_be_used_is_a_400_that_names_the_field(
    server: Server, fields: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.completions.create(model=server.model, prompt="x", stream=stream, extra_body=fields)
    assert (caught.value.param, caught.value.code) == (param, "invalid_value")
    assert len(caught.value.response.content) < 1000


def test_keywords_that_cannot_be_kept_are_left_out_of_account_only_if_not_strict(server: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    loose = json_schema({**schema, "not": {}}, strict=False)
    answer = chat(server, response_format=loose, max_tokens=100).choices[0].message.content
    assert json.loads(answer) == {"a": 1}


def test_a_grammar_that_breaks_its_compiler_leaves_the_others_alone(server: Server) -> None:
    rules = "\n".join(f'r{number}: "x" r{number + 1} | "y" r{number + 1}' for number in range(8_000))
    with pytest.raises(openai.BadRequestError, match="too large or nested too deeply"):
        complete(server, {"grammar": f'start: r0\n{rules}\nr8000: "z"'})
    assert complete(server, {"choice": ["fine"]}).choices[0].text == "fine"


def test_the_official_client_parses_answers_into_its_own_types(server: Server) -> None:
    for seed in range(3):
        answer = server.client.chat.completions.parse(
            model=server.model,
            messages=[{"role": "user", "content": "Plan!"}],
            response_format=Plan,
            seed=seed,
            temperature=1,
        )
        plan = answer.choices[0].message.parsed
        assert isinstance(plan, Plan)
        assert len(plan.steps) <= 2
