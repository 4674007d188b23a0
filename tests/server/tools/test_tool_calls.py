"""Calls in a growing text: found however it is cut, and never invented."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.tools.tool_calls import MAX_HEAD_CHARACTERS, ArgumentsPart, CallPart, Part, TextPart, ToolCallParser

NAMES = ("get_weather", "add")
OSLO = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
SUM = '<tool_call>{"name": "add", "arguments": {"terms": [1, {"x": "}"}]}}</tool_call>'


def parse(*pieces: str) -> tuple[str, list[tuple[str, str]]]:
    """The text beside the calls; name and arguments of each call."""
    parser = ToolCallParser(NAMES)
    parts: list[Part] = []
    for piece in pieces:
        parts += parser.push(piece)
    parts += parser.finish()
    text, calls = "", []
    for part in parts:
        match part:
            case TextPart(more):
                assert more
                text += more
            case CallPart(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case ArgumentsPart(index, more):
                assert index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + more)
    assert parser.num_calls == len(calls)
    return text, calls


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        ("Hello, world! \n", "Hello, world! \n", []),
        ("", "", []),
        (OSLO, "", [("get_weather", '{"city": "Oslo"}')]),
        ("\n" + OSLO + "\n", "", [("get_weather", '{"city": "Oslo"}')]),
        (f"Let me see. {OSLO}\n{SUM}", "Let me see.", [("get_weather", ...), ("add", '{"terms": [1, {"x": "}"}]}')]),
        (f"{OSLO}\n and then\n", " and then".strip(), [("get_weather", '{"city": "Oslo"}')]),
        (f"a {OSLO} b {SUM} c", "abc", [("get_weather", ...), ("add", ...)]),
        ('<tool_call>{"arguments": {"a": 1}, "id": 7, "name": "add"}</tool_call>', "", [("add", '{"a": 1}')]),
        ('<tool_call>{"name": "add", "parameters": {}}</tool_call>', "", [("add", "{}")]),
        ('<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
        ('<tool_call>{"name": "add", "arguments": null}</tool_call>', "", [("add", "{}")]),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
        ('<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),
        ('<tool_call>{"name": "add", "arguments": {}', "", [("add", "{}")]),
        (f'<tool_call>{{"name": "add", "arguments": {{}}}}{OSLO}', "", [("add", "{}"), ("get_weather", ...)]),
        ('<tool_call>{"name": "add", "arguments": {"a": "</tool_call>"}}</tool_call>!', "!", [("add", ...)]),
    ],
)
def test_calls_are_taken_out_of_the_text(answer: str, text: str, calls: list[tuple[str, object]]) -> None:
    found_text, found = parse(answer)
    assert found_text == text
    assert [name for name, _ in found] == [name for name, _ in calls]
    assert all(wanted in (..., arguments) for (_, arguments), (_, wanted) in zip(found, calls, strict=True))


@pytest.mark.parametrize(
    "answer",
    [
        "<tool_call>",
        "<tool_call>not json</tool_call> \n",
        "  <tool_call> [1, 2]</tool_call>",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "add" "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "argu',
        '<tool_call>{"name": bad}</tool_call> and more',
        "a <tool_cal b </tool_call>",
        "<tool_call>{" + '"x": 1, ' * MAX_HEAD_CHARACTERS,
    ],
    ids=lambda answer: answer[:50],
)
def test_what_only_looks_like_a_call_stays_text(answer: str) -> None:
    assert parse(answer) == (answer, [])
    assert parse(*answer[:400]) == (answer[:400], [])


def test_a_call_after_something_that_is_none_is_found() -> None:
    assert parse(f"<tool_call>no {OSLO}") == ("<tool_call>no", [("get_weather", '{"city": "Oslo"}')])


def test_text_comes_as_soon_as_it_can_be_no_call() -> None:
    parser = ToolCallParser(NAMES)
    assert parser.push("Hel") == [TextPart("Hel")]
    assert parser.push("lo <tool") == [TextPart("lo")]
    assert parser.push("box>") == [TextPart(" <toolbox>")]


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolCallParser(NAMES)
    assert parser.push('<tool_call>\n{"name": "add", "arguments": ') == []
    assert parser.push('{"a"') == [CallPart(0, "add"), ArgumentsPart(0, '{"a"')]
    assert parser.push(": 1") == [ArgumentsPart(0, ": 1")]
    assert parser.push("}}\n</tool") == [ArgumentsPart(0, "}")]
    assert parser.push("_call>") == []
    assert parser.finish() == []


FRAGMENTS = [
    OSLO,
    SUM,
    "<tool_call>",
    "</tool_call>",
    '{"name": "add"',
    ', "arguments": ',
    '{"a": "</tool_call>"}',
    "}",
    '"',
    " ",
    "\n",
    "text",
    "<",
    "\\",
    "3",
    "null",
]


@settings(max_examples=400, deadline=None)
@given(fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=9), cuts=st.lists(st.integers(0, 400), max_size=12))
def test_what_comes_out_does_not_depend_on_the_cuts(fragments: list[str], cuts: list[int]) -> None:
    answer = "".join(fragments)
    places = [0, *sorted(min(cut, len(answer)) for cut in cuts), len(answer)]
    pieces = [answer[begin:end] for begin, end in itertools.pairwise(places)]
    whole = parse(answer)
    assert parse(*pieces) == whole
    assert parse(*answer) == whole


@settings(max_examples=100, deadline=None)
@given(
    arguments=st.dictionaries(
        st.text(max_size=5), st.text(max_size=8) | st.lists(st.integers(), max_size=3), max_size=4
    )
)
def test_any_arguments_come_through(arguments: dict[str, object]) -> None:
    written = json.dumps(arguments, ensure_ascii=False)
    answer = f'<tool_call>\n{{"name": "add", "arguments": {written}}}\n</tool_call>'
    assert parse(*answer) == ("", [("add", written)])
