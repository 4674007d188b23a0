"""What is thought, told apart from what is said: text by text, in any pieces, and counted in tokens."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.reasoning import (
    AnswerParser,
    Thinking,
    ThoughtCounter,
    ThoughtForm,
    ThoughtPart,
    ThoughtSplitter,
    ThoughtStart,
    begin_of,
    thought_form,
)
from server.text.tokenizer import Tokenizer
from server.tools.tool_calls import ArgumentsPart, CallPart, TextPart, ToolCallParser
from tests.server.thinking_models import CLOSE_ID, OPEN_ID, OPENING_TEMPLATE, thinking_tokenizer

CASES = [
    (ThoughtStart.FREE, "<think>\nWell, 2 < 3.\n</think>\n\nYes.\n", "Well, 2 < 3.", "Yes.\n"),
    (ThoughtStart.FREE, " \n<think>a</think>b</think>c", "a", "b</think>c"),
    (ThoughtStart.FREE, "The tag <think> opens, </think> closes.", "", "The tag <think> opens, </think> closes."),
    (ThoughtStart.FREE, "\n<thin", "", "\n<thin"),
    (ThoughtStart.FREE, "<think>\n\n</think>\n\nHi", "", "Hi"),
    (ThoughtStart.FREE, "<think>cut off </thin", "cut off </thin", ""),
    (ThoughtStart.OPENED, "Hm.\n</think>\nYes.", "Hm.", "Yes."),
    (ThoughtStart.OPENED, "<think>\nHm.</think> Yes.", "Hm.", "Yes."),
    (ThoughtStart.OPENED, "\n<thinking> is it </think>ok", "<thinking> is it", "ok"),
    (ThoughtStart.OPENED, "never done ", "never done", ""),
    (ThoughtStart.CLOSED, "<think>no</think> really\n", "", "<think>no</think> really\n"),
    (ThoughtStart.FREE, "", "", ""),
]


def split(begin: ThoughtStart, pieces: list[str]) -> tuple[str, str]:
    splitter = ThoughtSplitter(begin)
    parts = [part for piece in pieces for part in splitter.push(piece)] + splitter.push("", is_last=True)
    kinds = [type(part) for part in parts]
    assert kinds == sorted(kinds, key=[ThoughtPart, TextPart].index)  # thoughts come first
    assert all(part.text for part in parts)
    thought = "".join(part.text for part in parts if isinstance(part, ThoughtPart))
    return thought, "".join(part.text for part in parts if isinstance(part, TextPart))


@pytest.mark.parametrize(("begin", "text", "thought", "said"), CASES)
def test_a_thought_is_told_apart_in_any_pieces(begin: ThoughtStart, text: str, thought: str, said: str) -> None:
    assert split(begin, [text]) == (thought, said)
    assert split(begin, list(text)) == (thought, said)
    for size in (2, 3, 5, 7):
        assert split(begin, [text[i : i + size] for i in range(0, len(text), size)]) == (thought, said)


@given(
    st.sampled_from(ThoughtStart),
    st.lists(st.sampled_from(["<think>", "</think>", "<", "</thi", "think>", " ", "\n", "a", "é"]), max_size=12),
    st.data(),
)
def test_pieces_never_matter(begin: ThoughtStart, fragments: list[str], data: st.DataObject) -> None:
    text = "".join(fragments)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(begin, pieces) == split(begin, [text])


def test_text_is_not_held_back_longer_than_needed() -> None:
    splitter = ThoughtSplitter(ThoughtStart.FREE)
    assert splitter.push("<think>So") == [ThoughtPart("So")]
    assert splitter.push(" be it </th") == [ThoughtPart(" be it")]
    assert splitter.push("ink> ") == []
    assert splitter.push("Yes") == [TextPart("Yes")]
    assert splitter.push(" <") == [TextPart(" <")]


def test_calls_are_looked_for_in_what_is_said_only() -> None:
    call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    parser = AnswerParser(ThoughtStart.FREE, ToolCallParser(["clock"]))
    parts = parser.push(f"<think>I could say {call}</think>\n{call}", is_last=True)
    assert parts == [ThoughtPart(f"I could say {call}"), CallPart(0, "clock"), ArgumentsPart(0, "{}")]
    assert parser.num_calls == 1


@pytest.fixture
def marked(tokenizer_folder: Path) -> Tokenizer:
    return thinking_tokenizer(tokenizer_folder, marked=True)


def count(tokenizer: Tokenizer, begin: ThoughtStart, token_ids: list[int]) -> list[int]:
    form = thought_form("think", tokenizer)
    assert form is not None
    counter = ThoughtCounter(Thinking(form, begin), tokenizer.vocabulary)
    counts = []
    for token_id in token_ids:
        counter.take([token_id])
        counts.append(counter.num_tokens)
    whole = ThoughtCounter(Thinking(form, begin), tokenizer.vocabulary)
    whole.take(token_ids)
    assert whole.num_tokens == counts[-1]
    return counts


def test_tokens_of_a_thought_are_counted_with_its_marks(byte_tokenizer: Tokenizer, marked: Tokenizer) -> None:
    text = b"<think>ab</think>\nYes"
    assert count(byte_tokenizer, ThoughtStart.FREE, [*text])[6:] == [
        7,
        8,
        9,
        10,
        11,
        12,
        13,
        14,
        15,
        16,
        17,
        17,
        17,
        17,
        17,
    ]
    assert count(byte_tokenizer, ThoughtStart.FREE, [*text])[:6] == [0] * 6
    assert count(byte_tokenizer, ThoughtStart.OPENED, [*b"ab</think>Yes"])[-1] == 10
    assert count(byte_tokenizer, ThoughtStart.FREE, [*b"No <think>a</think>"])[-1] == 0
    assert count(byte_tokenizer, ThoughtStart.CLOSED, [*text])[-1] == 0
    assert count(byte_tokenizer, ThoughtStart.OPENED, [*b"cut off"])[-1] == 7
    assert count(marked, ThoughtStart.FREE, [OPEN_ID, 97, CLOSE_ID, 97, 97]) == [1, 2, 3, 3, 3]


def test_the_vocabulary_or_the_template_says_whether_a_model_thinks(
    byte_tokenizer: Tokenizer, marked: Tokenizer, tokenizer_folder: Path
) -> None:
    assert thought_form("auto", byte_tokenizer) is None
    assert thought_form("think", byte_tokenizer) == ThoughtForm()
    assert thought_form("auto", marked) == ThoughtForm(frozenset({OPEN_ID, CLOSE_ID}))
    assert thought_form("none", marked) is None
    assert thought_form("think", None) is None
    told = thinking_tokenizer(tokenizer_folder, template=OPENING_TEMPLATE)
    assert thought_form("auto", told) == ThoughtForm()


@pytest.mark.parametrize(
    ("prompt", "continued", "begin"),
    [
        ("assistant\n<think>\n", "", ThoughtStart.OPENED),
        ("assistant\n<think>\n\n</think>\n\n", "", ThoughtStart.CLOSED),
        ("What does <think> do?<|im_end|>\nassistant\n", "", ThoughtStart.FREE),
        ("assistant\n<think>\nLet me", "<think>\nLet me", ThoughtStart.OPENED),
        ("assistant\n<think>\na</think>So", "<think>\na</think>So", ThoughtStart.CLOSED),
        ("assistant\nSo", "So", ThoughtStart.CLOSED),
    ],
)
def test_the_end_of_the_prompt_says_where_an_answer_begins(
    byte_tokenizer: Tokenizer, prompt: str, continued: str, begin: ThoughtStart
) -> None:
    assert begin_of([*prompt.encode()], byte_tokenizer, continued=continued) is begin
