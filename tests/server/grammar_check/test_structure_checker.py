"""Grammars are compiled before anything is answered: the good ones once, the bad ones refused in words and in time."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.engine.grammars.grammar import HEADER
from server.grammar_check.checker import GrammarChecker, GrammarLimits, GrammarRefusedError, GrammarsBusyError
from server.grammar_check.sources import GrammarKind, GrammarSource, SourceError, schema_text, translate
from tests.server.fake_engine import FakeEngine

INFO = FakeEngine().info
pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def checking(folder: Path, **limits: Any) -> AsyncIterator[GrammarChecker]:
    checker = GrammarChecker(folder, GrammarLimits(**limits))
    try:
        yield checker
    finally:
        await checker.close()


def source(kind: str, text: str) -> GrammarSource:
    return GrammarSource(GrammarKind(kind), text)


def schema(value: dict[str, Any], *, strict: bool = True) -> GrammarSource:
    return source("json_schema", schema_text(value, strict=strict))


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        inner = {"type": "object", "properties": {"inner": inner}}
    return inner


GOOD = [
    schema({"type": "object"}),
    schema(nested(20)),
    schema({"type": "object", "not": {}}, strict=False),
    schema({"type": "object", "properties": {"next": {"$ref": "#"}}}),
    source("regex", "^a+$"),
    source("regex", "(a+)+$"),
    source("regex", "a/b\nc"),
    source("regex", ""),
    source("choice", json.dumps(["a", "", 'quote"', "back\\slash", "日本", "line\nbreak", "<|im_end|>"])),
    source("choice", json.dumps([f"number {number} of many" for number in range(3_000)])),
    source("choice", json.dumps([""])),
    source("grammar", 'start: start "a" | "a"'),
    source("grammar", 'start: mid "a" | "a"\nmid: other\nother: start "a" | start'),
    source("grammar", 'start: nothing start "a" | "a"\nnothing: "" | "b"'),
    source("grammar", 'root ::= "yes" | "no" root'),
    source("grammar", 'root ::= ("a"?)* (("b" | "c"){2}){3}'),
    source("grammar", r'root ::= "\x41\u00e9\U0001F642" [\u00e0-\u00ff] [^"\\\x7F\x00-\x1F] "\n\\x41"'),
]
BAD = [
    (schema({"type": "object", "not": {}}), "Unimplemented keys"),
    (schema({"$ref": "https://example.com/schema.json"}), "not fetch"),
    (schema({"$ref": "file:///etc/passwd"}), "not fetch"),
    (schema({"$ref": "#/$defs/missing"}), ""),
    (schema({"$ref": "#"}), "no text at all"),
    (schema({"type": "strin"}), "Invalid type"),
    (schema(nested(150)), "recursion limit"),
    (schema({"type": "integer", "minimum": 2, "maximum": 1}), "Unsatisfiable"),
    (source("regex", "("), "unclosed group"),
    (source("regex", "(?=a)b"), "look-around"),
    (source("regex", "(?:" * 5_000 + "a" + ")" * 5_000), "nest"),
    (source("grammar", "root ::= root"), "no text at all"),
    (source("grammar", "this is no grammar"), "neither Lark nor GBNF"),
    (source("grammar", '%llguidance {}\nstart: "a"'), "%llguidance"),
    (source("grammar", "start: " + "(" * 3_000 + '"a"' + ")" * 3_000), "nested"),
]


async def test_good_grammars_become_grammars_for_the_engine(tokenizer_folder: Path) -> None:
    async with checking(tokenizer_folder) as checker:
        for good in GOOD:
            assert (await checker.check(good, INFO)).text.startswith(HEADER)


@pytest.mark.parametrize(
    ("gbnf", "lark"),
    [
        ('root ::= ("a"?)* "b"', 'start: ("a"?)* "b"'),
        (r'root ::= "\x41\u00e9" [\u00e0-\x7a] "\\x41"', r'start: "Aé" /[à-z]/ "\\x41"'),
        (r'root ::= "\x22" [\x00-\x1F]', r'start: "\x22" /[\x00-\x1F]/'),
    ],
)
def test_gbnf_keeps_its_parentheses_and_characters(gbnf: str, lark: str) -> None:
    assert translate(source("grammar", gbnf)).strip() == lark


async def test_bad_grammars_are_refused_in_words(tokenizer_folder: Path) -> None:
    async with checking(tokenizer_folder) as checker:
        for bad, message in BAD:
            with pytest.raises(GrammarRefusedError) as refused:
                await checker.check(bad, INFO)
            assert message in str(refused.value)
            assert len(str(refused.value)) <= 300
        pids = checker.pids
        assert len(pids) == 1
        await checker.check(GOOD[0], INFO)
        assert checker.pids == pids


async def test_a_grammar_that_breaks_the_compiler_is_refused_and_the_next_one_is_right(tokenizer_folder: Path) -> None:
    rules = "\n".join(f'r{number}: "x" r{number + 1} | "y" r{number + 1}' for number in range(8_000))
    async with checking(tokenizer_folder) as checker:
        with pytest.raises(GrammarRefusedError, match="too large or nested too deeply"):
            await checker.check(source("grammar", f'start: r0\n{rules}\nr8000: "z"'), INFO)
        assert (await checker.check(GOOD[0], INFO)).text


async def test_a_grammar_that_takes_too_long_is_refused_and_its_process_ends(tokenizer_folder: Path) -> None:
    async with checking(tokenizer_folder) as checker:
        await checker.check(GOOD[0], INFO)
        (pid,) = checker.pids
        process = psutil.Process(pid)
        checker._limits = GrammarLimits(timeout_s=0.001)
        slow = schema({"type": "object", "properties": {f"k{number}": {"type": "string"} for number in range(5_000)}})
        with pytest.raises(GrammarRefusedError, match=r"longer than 0\.001 s"):
            await checker.check(slow, INFO)
        assert not process.is_running()


async def test_a_grammar_over_the_limit_is_refused_at_once(tokenizer_folder: Path) -> None:
    async with checking(tokenizer_folder, max_bytes=1024) as checker:
        with pytest.raises(GrammarRefusedError, match=r"1,025 bytes, the limit is 1,024"):
            await checker.check(source("regex", "a" * 1025), INFO)
        assert not checker.pids


async def test_a_grammar_is_compiled_once(tokenizer_folder: Path) -> None:
    async with checking(tokenizer_folder) as checker:
        first, second = await asyncio.gather(checker.check(GOOD[0], INFO), checker.check(GOOD[0], INFO))
        await checker.close()
        assert first == second == await checker.check(GOOD[0], INFO)
        assert not checker.pids


SLOW = "tests.server.grammar_check.slow_worker"
"""Answers when a file named by the grammar is there."""


@asynccontextmanager
async def slowly(tmp_path: Path, **limits: Any) -> AsyncIterator[GrammarChecker]:
    checker = GrammarChecker(tmp_path, GrammarLimits(**{"timeout_s": 60.0, **limits}), module=SLOW)
    try:
        yield checker
    finally:
        await checker.close()


async def test_slow_grammars_of_one_key_keep_no_other_key_waiting(tmp_path: Path) -> None:
    async with slowly(tmp_path) as checker:
        slow = [
            asyncio.create_task(checker.check(source("regex", str(tmp_path / f"gate{number}")), INFO, key="a"))
            for number in range(4)
        ]
        gate = tmp_path / "open"
        gate.touch()
        assert (await checker.check(source("regex", str(gate)), INFO, key="b")).text == str(gate)
        assert not any(task.done() for task in slow)
        for number in range(4):
            (tmp_path / f"gate{number}").touch()
        assert len({spec.text for spec in await asyncio.gather(*slow)}) == 4
        assert len(checker.pids) == 3


async def test_one_key_cannot_fill_the_queue(tmp_path: Path) -> None:
    async with slowly(tmp_path, max_waiting=4) as checker:
        slow = [
            asyncio.create_task(checker.check(source("regex", str(tmp_path / f"gate{number}")), INFO, key="a"))
            for number in range(3)
        ]
        await asyncio.sleep(0)
        with pytest.raises(GrammarsBusyError):
            await checker.check(source("regex", "one more"), INFO, key="a")
        gate = tmp_path / "open"
        gate.touch()
        assert (await checker.check(source("regex", str(gate)), INFO, key="b")).text
        for task in slow:
            task.cancel()


async def test_what_was_found_for_somebody_who_left_is_there_when_he_comes_again(tmp_path: Path) -> None:
    async with slowly(tmp_path) as checker:
        wanted = source("regex", str(tmp_path / "gate"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await checker.check(wanted, INFO)
        pids = checker.pids
        (tmp_path / "gate").touch()
        assert (await checker.check(wanted, INFO)).text == str(tmp_path / "gate")
        assert checker.pids >= pids


async def test_a_refusal_is_remembered(tokenizer_folder: Path) -> None:
    async with checking(tokenizer_folder) as checker:
        for _ in range(2):
            with pytest.raises(GrammarRefusedError, match="unclosed group"):
                await checker.check(source("regex", "("), INFO)
            await checker.close()
        assert not checker.pids


async def test_too_many_at_once_are_refused_for_now(tokenizer_folder: Path) -> None:
    async with checking(tokenizer_folder, max_waiting=1) as checker:
        results = await asyncio.gather(*(checker.check(good, INFO) for good in GOOD[:3]), return_exceptions=True)
        assert [isinstance(result, GrammarsBusyError) for result in results] == [False, True, True]


async def test_a_request_that_is_cancelled_leaves_no_answer_for_the_next(tokenizer_folder: Path) -> None:
    async with checking(tokenizer_folder) as checker:
        await checker.check(GOOD[0], INFO)
        asking = asyncio.create_task(checker.check(source("regex", "leaves"), INFO))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert "stays" in (await checker.check(source("regex", "stays"), INFO)).text


async def test_a_folder_without_tokenizer_refuses_every_grammar_without_a_process(tmp_path: Path) -> None:
    async with checking(tmp_path) as checker:
        for good in GOOD[:2]:
            with pytest.raises(GrammarRefusedError, match="no tokenizer"):
                await checker.check(good, INFO)
        assert not checker.pids


async def test_a_schema_deeper_than_python_goes_is_refused() -> None:
    with pytest.raises(SourceError, match="nested too deeply"):
        schema_text(nested(100_000), strict=True)


OBJECT = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"type": "integer"}}}}}


def test_objects_that_name_properties_are_closed() -> None:
    closed = json.loads(schema_text(OBJECT, strict=True))
    assert (closed["additionalProperties"], closed["properties"]["a"]["additionalProperties"]) == (False, False)
    assert "additionalProperties" not in closed["properties"]["a"]["properties"]["b"]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {**OBJECT["properties"]["a"], "additionalProperties": True},
        {**OBJECT["properties"]["a"], "additionalProperties": {"type": "string"}},
        {**OBJECT["properties"]["a"], "allOf": [{"properties": {"c": {}}}]},
        {"enum": [{"properties": {"a": 1}}]},
        {"const": None, "default": None},
    ],
    ids=str,
)
def test_what_says_otherwise_stays_open(schema: dict[str, Any]) -> None:
    written = json.loads(schema_text(schema, strict=True))
    del written["x-guidance"]
    assert written == schema


def test_keywords_that_are_null_are_left_out() -> None:
    written = json.loads(schema_text({"type": "string", "title": None, "maxLength": None}, strict=True))
    assert written.keys() == {"type", "x-guidance"}
