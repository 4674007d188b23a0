"""The language of answers that call tools, text by text."""

import json
from array import array
from dataclasses import replace
from typing import Any

import pytest

from dijiang_model.text.vocabulary import Vocabulary
from server.engine.grammars.grammar import HEADER, GrammarCompiler
from server.grammar_check import worker
from server.grammar_check.sources import GrammarKind, GrammarSource, Lead, schema_text, translate
from server.tools.tool_grammar import Callable, tool_grammar

ADD = Callable(
    "add",
    {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False},
    is_strict=True,
)
CLOCK = Callable("clock", None)
EOS = 256
SPECIAL_OPEN, SPECIAL_CLOSE = 257, 258
VOCABULARY = Vocabulary(
    (*(bytes([byte]) for byte in range(256)), b"<|end|>", b"<tool_call>", b"</tool_call>"),
    frozenset({EOS, SPECIAL_OPEN, SPECIAL_CLOSE}),
)


def call(name: str, arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


SUM, TIME = call("add", {"n": 5}), call("clock", {})


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(VOCABULARY, vocab_size=259, eos_token_ids=(EOS,))


def accepts(compiler: GrammarCompiler, source: GrammarSource, tokens: list[int]) -> bool:
    """Whether the mask permits each token in turn, and the end behind them."""
    constraint = compiler.constraint(compiler.compile(HEADER + source.text))
    for token_id in (*tokens, EOS):
        words = array("q", bytes(8 * 5))
        constraint.write_mask(words, 0)
        if not words[token_id // 64] >> (token_id % 64) & 1:
            return False
        assert constraint.accept(token_id) is None
    return True


def grammar(**options: Any) -> GrammarSource:
    return tool_grammar([ADD, CLOCK], **{"is_forced": False, "is_parallel": True, **options})


TEXT = "some text with < and <tool and 日本\n"
CASES = [
    ({"is_forced": True}, [SUM, f"{SUM}\n{TIME}", f"{TIME}\n{SUM}\n{SUM}"], ["", TEXT, f"{SUM}{TIME}", f" {SUM}"]),
    ({"is_forced": True, "is_parallel": False}, [SUM, TIME], ["", f"{SUM}\n{TIME}", f"{SUM}\n"]),
    (
        {},
        ["", TEXT, SUM, f"{TEXT}{SUM}", f"{SUM}{TIME}{TEXT}", f"{TEXT}{SUM}\n{TEXT}{TIME}"],
        [SUM[:-5], "<tool_call>"],
    ),
    ({"is_parallel": False}, ["", TEXT, f"{TEXT}{SUM}"], [f"{SUM}\n{TIME}", f"{SUM}{TEXT}"]),
    ({}, [], [call("add", {"n": "5"}), call("add", {}), call("minus", {"n": 5}), call("clock", {"x": 1})]),
]


@pytest.mark.parametrize(("options", "good", "bad"), CASES)
def test_answers_are_text_or_valid_calls_as_it_is_asked_for(
    compiler: GrammarCompiler, options: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    for answer in good:
        assert accepts(compiler, grammar(**options), list(answer.encode())), answer
    for answer in bad:
        assert not accepts(compiler, grammar(**options), list(answer.encode())), answer


def test_content_beside_calls_follows_its_schema(compiler: GrammarCompiler) -> None:
    content = GrammarSource(GrammarKind.JSON_SCHEMA, schema_text({"enum": [1, 2]}, strict=True))
    for answer, is_good in (
        ("1", True),
        (SUM, True),
        (f"{SUM}\n{TIME}", True),
        ("3", False),
        (TEXT, False),
        ("", False),
    ):
        assert accepts(compiler, grammar(content=content), list(answer.encode())) is is_good


@pytest.mark.parametrize("options", [{"is_forced": True}, {}, {"is_parallel": False}])
def test_marks_with_tokens_of_their_own_are_those_tokens(compiler: GrammarCompiler, options: dict[str, Any]) -> None:
    body = list(SUM.removeprefix("<tool_call>").removesuffix("</tool_call>").encode())
    source = grammar(is_special=True, **options)
    assert accepts(compiler, source, [SPECIAL_OPEN, *body, SPECIAL_CLOSE])
    assert not accepts(compiler, source, [SPECIAL_OPEN, *b"other", SPECIAL_CLOSE])


MARKED = Vocabulary(
    (*(bytes([byte]) for byte in range(256)), b"<|end|>", b"<think>", b"</think>"), frozenset({EOS, 257, 258})
)
RULES = GrammarSource(GrammarKind.GRAMMAR, 'start: thought "!"\nthought: "a" | answer\nanswer: "b"')
"""With rules of the same names as those around it."""


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(
    ("source", "good", "bad"),
    [
        (GrammarSource(GrammarKind.JSON_SCHEMA, '{"type":"object"}'), '{"a":1}', "[1]"),
        (GrammarSource(GrammarKind.REGEX, "a[0-9]+"), "a17", "17"),
        (GrammarSource(GrammarKind.CHOICE, '["yes", "no"]'), "yes", "maybe"),
        (RULES, "b!", "c!"),
        (grammar(is_forced=True), SUM, "no call"),
    ],
)
def test_a_grammar_is_about_what_comes_behind_a_thought(
    compiler: GrammarCompiler, source: GrammarSource, good: str, bad: str, marked: bool
) -> None:
    if marked:
        compiler = GrammarCompiler(MARKED, vocab_size=259, eos_token_ids=(EOS,))
    begin, end = ([257], [258]) if marked else ([*b"<think>"], [*b"</think>"])
    thought = [*"\nhm, <b> 日本 {\n".encode()]

    def fits(lead: Lead, *pieces: list[int]) -> bool:
        text = translate(replace(source, lead=lead, is_lead_special=marked))
        return accepts(compiler, GrammarSource(GrammarKind.LARK, text), [token for piece in pieces for token in piece])

    for behind in ([*b"\n\n"], []):
        assert fits(Lead.MAYBE_THOUGHT, begin, thought, end, behind, [*good.encode()])
        assert fits(Lead.THOUGHT, thought, end, behind, [*good.encode()])
        assert not fits(Lead.THOUGHT, thought, end, behind, [*bad.encode()])
    assert fits(Lead.MAYBE_THOUGHT, [*good.encode()])
    assert not fits(Lead.MAYBE_THOUGHT, [*bad.encode()])
    assert not fits(Lead.THOUGHT, thought)  # a thought that was opened must end
    assert not fits(Lead.MAYBE_THOUGHT, begin, thought)


def test_an_error_behind_a_thought_counts_the_clients_own_lines(compiler: GrammarCompiler) -> None:
    fields = {"kind": "grammar", "text": 'start: "a"\n  | missing', "is_lead_special": False}
    told = [worker.answer(compiler, json.dumps({**fields, "lead": lead})) for lead in ("", "thought")]
    assert told[0] == told[1]
    assert "line 1" in told[0]["error"]
