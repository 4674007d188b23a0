"""Grammars over a vocabulary: what is permitted, what is refused, and in which words."""

import json
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dijiang_model.text.folder import UnsupportedTokenizerError
from dijiang_model.text.vocabulary import Vocabulary
from server.engine.grammars.grammar import HEADER, GrammarCompiler, GrammarConstraint, GrammarError, read_vocabulary
from server.grammar_check.sources import GrammarKind, GrammarSource, schema_text, translate
from server.text.tokenizer import load_tokenizer
from tests.byte_tokenizer import write_byte_tokenizer

EOS = 258
VOCAB_SIZE = 300
"""More than the tokenizer's 260, and no multiple of 32: as padded embeddings have it."""
NUM_WORDS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def compiler(folder: Path) -> GrammarCompiler:
    return GrammarCompiler.load(folder, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))


def constraint(compiler: GrammarCompiler, lark: str) -> GrammarConstraint:
    return compiler.constraint(compiler.compile(HEADER + lark))


def permitted(constraint: GrammarConstraint) -> set[int]:
    """Tokens of the mask, which is written between words that must stay as they are."""
    words = array("q", [-1] * (NUM_WORDS + 2))
    for place in range(1, NUM_WORDS + 1):
        words[place] = 0
    constraint.write_mask(words, 1)
    assert (words[0], words[-1]) == (-1, -1)
    bits = int.from_bytes(words[1:-1].tobytes(), "little")
    return {token_id for token_id in range(64 * NUM_WORDS) if bits >> token_id & 1}


def accepts(constraint: GrammarConstraint, text: str) -> bool:
    """Whether this is a whole text of the grammar, byte by byte."""
    for byte in text.encode():
        if byte not in permitted(constraint) or constraint.accept(byte) is not None:
            return False
    return EOS in permitted(constraint) and constraint.accept(EOS) is None and constraint.has_ended


def test_only_what_leads_to_a_text_of_the_grammar_is_permitted(compiler: GrammarCompiler) -> None:
    words = constraint(compiler, 'start: "cat" | "car" | "ca"')
    assert permitted(words) == {ord("c")}
    assert words.accept(ord("c")) is None
    assert words.accept(ord("a")) is None
    assert permitted(words) == {ord("t"), ord("r"), EOS}
    assert words.accept(ord("t")) is None
    assert permitted(words) == {EOS}
    assert not words.has_ended
    assert words.accept(EOS) is None
    assert words.has_ended


def test_a_token_outside_of_the_grammar_is_reported_once_and_for_all(compiler: GrammarCompiler) -> None:
    words = constraint(compiler, 'start: "ab"')
    assert words.accept(ord("x")) is not None
    assert words.accept(ord("a")) is not None
    assert permitted(words) == set()


def test_constraints_of_one_grammar_do_not_touch_each_other(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(HEADER + 'start: "ab"')
    first, second = compiler.constraint(matcher), compiler.constraint(matcher)
    assert first.accept(ord("a")) is None
    assert permitted(second) == {ord("a")}
    assert permitted(first) == {ord("b")}


def test_special_tokens_are_no_text(compiler: GrammarCompiler) -> None:
    anything = constraint(compiler, r"start: /(.|\n)+/")
    assert permitted(anything).isdisjoint(range(256, VOCAB_SIZE))
    assert constraint(compiler, "start: <|im_start|>").accept(257) is None


def test_forced_text_leaves_its_spelling_to_the_model() -> None:
    vocabulary = Vocabulary((b"a", b"ab", b"abc", b"b", b"</s>"), frozenset({4}))
    compiler = GrammarCompiler(vocabulary, vocab_size=8, eos_token_ids=(4,))
    assert permitted_of_eight(compiler, 'start: "abc"') == {0, 1, 2}


def test_a_model_without_a_tokenizer_takes_no_grammar(tmp_path: Path) -> None:
    with pytest.raises(GrammarError, match="no tokenizer"):
        GrammarCompiler.load(tmp_path, vocab_size=8, eos_token_ids=(0,))


def test_a_model_without_an_end_takes_no_grammar(folder: Path) -> None:
    with pytest.raises(GrammarError, match="no end-of-sequence token"):
        GrammarCompiler.load(folder, vocab_size=VOCAB_SIZE, eos_token_ids=())


def _ways(prefix: str) -> str:
    return " | ".join(f'"{prefix}{number}"' for number in range(3000))


WIDE = f"start: a b\na: {_ways('x')}\nb: {_ways('y')}"
"""Small, and its first mask is cheap; behind the first token there are too many ways to go."""


@pytest.mark.parametrize(
    ("lark", "message"),
    [
        ("start: start", "permits no text at all"),
        ('start: "a', "line 1, column 10"),
        ("start: /(/", "unclosed group"),
        (WIDE, "2000"),
        ("start: missing", "missing"),
        ('start: %json {"$ref": "https://example.com/schema.json"}', "does not fetch"),
        ('start: %json {"type": "object", "not": {}}', 'Unimplemented keys: \\["not"\\]'),
        ('start: %json {"type": "strin"}', "Invalid type: strin"),
        ('start: %json {"type": "integer", "minimum": 5, "maximum": 1}', "Unsatisfiable"),
    ],
)
def test_a_bad_grammar_is_refused_in_words(compiler: GrammarCompiler, lark: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message) as refused:
        compiler.compile(HEADER + lark)
    assert "no_forcing" not in str(refused.value)
    assert len(str(refused.value)) <= 300


@pytest.mark.parametrize("repeats", ["((a{1000}){1000}){1000}", "b((a{1000}){1000}){1000}", "(a|b)*a(a|b){1000}"])
def test_texts_that_leave_no_choice_for_long_cost_no_time(compiler: GrammarCompiler, repeats: str) -> None:
    """Looked for ahead, these take seconds a step."""
    rows = constraint(compiler, f"start: /{repeats}/")
    for _ in range(50):
        token_id = min(permitted(rows) & {ord("a"), ord("b")})
        assert rows.accept(token_id) is None


# DEL comes only escaped, as control characters do.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-(10**9), 10**9) | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=8,
    )
)
def test_any_json_object_is_a_json_object(compiler: GrammarCompiler, value: object) -> None:
    text = json.dumps({"value": value}, ensure_ascii=False)
    assert accepts(constraint(compiler, 'start: %json {"type": "object"}'), text)


@pytest.mark.parametrize("others", [True, {"type": "integer"}, False], ids=str)
def test_a_property_that_the_schema_names_comes_once(compiler: GrammarCompiler, others: object) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": others}
    lark = "start: %json " + schema_text(schema, strict=True)
    assert accepts(constraint(compiler, lark), '{"a": 1}')
    assert accepts(constraint(compiler, lark), '{"a": 1, "b": 2}') == bool(others)
    assert not accepts(constraint(compiler, lark), '{"a": 1, "a": 2}')
    assert not accepts(constraint(compiler, lark), '{"a": 1, "b": 2, "a": 2}')


def test_the_vocabulary_is_read_as_the_text_layer_reads_it(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert read_vocabulary(folder / "tokenizer.json") == tokenizer.vocabulary


@pytest.mark.parametrize(
    "model", [{"type": "Unigram", "vocab": [["▁a", -1.0], ["<0x0A>", -2.0]]}, {"vocab": {"▁a": 0}}]
)
def test_pieces_with_byte_fallback_are_bytes(tmp_path: Path, model: object) -> None:
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    decoder = {"type": "Sequence", "decoders": steps}
    added = [{"id": 5, "content": "</s>", "special": True}]
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"model": model, "added_tokens": added, "decoder": decoder}))
    vocabulary = read_vocabulary(file)
    assert vocabulary.token_bytes[0] == b" a"
    assert vocabulary.token_bytes[1] == (b"\n" if isinstance(model["vocab"], list) else b"")  # type: ignore[index]
    assert vocabulary.special_ids == {5}
    compiler = GrammarCompiler(vocabulary, vocab_size=8, eos_token_ids=(5,))
    assert permitted_of_eight(compiler, 'start: " a" " a"') == {0}


def permitted_of_eight(compiler: GrammarCompiler, lark: str) -> set[int]:
    words = array("q", [0])
    constraint(compiler, lark).write_mask(words, 0)
    return {token_id for token_id in range(8) if words[0] >> token_id & 1}


@pytest.mark.parametrize("content", ["[]", "{", '{"model": {}}', '{"model": {"vocab": 3}, "added_tokens": []}'])
def test_a_tokenizer_that_is_not_understood_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UnsupportedTokenizerError):
        read_vocabulary(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("chosen", ["number 2999 of many", "number 2", ""])
def test_thousands_of_choices_are_no_more_than_one_pattern(compiler: GrammarCompiler, chosen: str) -> None:
    choices = ["", "number 2", *(f"number {number} of many" for number in range(3_000))]
    lark = translate(GrammarSource(GrammarKind.CHOICE, json.dumps(choices)))
    assert accepts(constraint(compiler, lark), chosen)
    assert not accepts(constraint(compiler, lark), "number 3")


LEFT_RECURSIVE = {
    "direct": 'start: start "a" | "a"',
    "through other rules": 'start: mid "a" | "a"\nmid: other\nother: start "a" | start',
    "behind nothing": 'start: nothing start "a" | "a"\nnothing: "" | "b"',
}


@pytest.mark.parametrize("lark", LEFT_RECURSIVE.values(), ids=LEFT_RECURSIVE)
def test_left_recursion_goes_on_as_long_as_the_text_does(compiler: GrammarCompiler, lark: str) -> None:
    words = constraint(compiler, lark)
    for _ in range(1_000):
        assert ord("a") in permitted(words)
        assert words.accept(ord("a")) is None
    assert EOS in permitted(words)
    assert words.accept(EOS) is None


def test_a_grammar_whose_steps_take_too_long_ends_its_answer(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("server.engine.grammars.grammar.time.thread_time", lambda: next(clock) * 0.0625)
    monkeypatch.setattr("server.engine.grammars.grammar._ALLOWED_S", 1.0)
    monkeypatch.setattr("server.engine.grammars.grammar._ALLOWED_S_PER_TOKEN", 0.025)
    words = constraint(compiler, 'start: "a"*')
    for _ in range(10):  # each takes 0.125 s, for mask and token
        assert ord("a") in permitted(words)
        assert words.accept(ord("a")) is None, "1.25 s were allowed"
    permitted(words)
    assert words.accept(ord("a")) == "it is too complex: its steps take too long"


def test_what_many_ways_to_read_a_text_cost_is_bounded(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.grammars.grammar._ALLOWED_S", 0.05)
    monkeypatch.setattr("server.engine.grammars.grammar._ALLOWED_S_PER_TOKEN", 0.001)
    words = constraint(compiler, 'start: "a"* start | "a"')
    for _ in range(5_000):
        permitted(words)
        if (problem := words.accept(ord("a"))) is not None:
            break
    assert problem is not None
    assert len(problem) < 200
