"""Grammars as clients write them, and their translation into the one dialect that the engine takes."""

import json
import re
import sys
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

_TIGHT: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""Of white space there is a space at most, behind a comma or colon. More, which JSON permits, is where small models go
astray, and costs everybody tokens."""
ANY_OBJECT: dict[str, Any] = {"type": "object"}
THOUGHT_MARKS = ("<think>", "</think>")


class GrammarKind(StrEnum):
    """What a source is written in."""

    JSON_SCHEMA = "json_schema"
    """A JSON schema, from `schema_text`."""
    REGEX = "regex"
    """A regular expression (Rust's, without look-around) that the whole text matches."""
    CHOICE = "choice"
    """A JSON list of texts."""
    GRAMMAR = "grammar"
    """Lark or GBNF, as a client wrote it."""
    LARK = "lark"
    """llguidance's Lark, as this server wrote it."""


class Lead(StrEnum):
    """What comes before the text that a grammar is about."""

    NOTHING = ""
    MAYBE_THOUGHT = "maybe_thought"
    """A thought between its marks, or nothing."""
    THOUGHT = "thought"
    """The rest of a thought that the prompt has opened, and its closing mark."""


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """A grammar before its translation.

    Attributes:
        lead: what comes before the text that it is about.
        is_lead_special: whether the marks around a thought are special tokens.
    """

    kind: GrammarKind
    text: str
    lead: Lead = Lead.NOTHING
    is_lead_special: bool = False


class SourceError(ValueError):
    """A source that is not even understood; the text is for the client who sent it."""


def schema_text(schema: dict[str, Any], *, strict: bool, whitespace: str | None = None) -> str:
    """A JSON schema with the options that it is compiled by; objects have no properties but those that they name.

    Args:
        schema: as a client sent it.
        strict: keywords that cannot be kept to are an error, and not left out of account.
        whitespace: a regular expression of what may stand between its parts; "": nothing; None: a space behind commas
            and colons, or nothing.

    Raises:
        SourceError: it is nested too deeply.
    """
    spaces = _TIGHT if whitespace is None else {"whitespace_flexible": bool(whitespace)}
    options = {**spaces, **({"whitespace_pattern": whitespace} if whitespace else {}), "lenient": not strict}
    try:
        return json.dumps(_closed(schema) | {"x-guidance": options}, separators=(",", ":"))
    except (RecursionError, ValueError) as error:
        raise SourceError("the schema is nested too deeply") from error


_OPEN = ("additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref")
_NAMED = ("properties", "$defs", "definitions")
_SCHEMAS = ("items", "additionalProperties", "prefixItems", "anyOf", "oneOf", "not")
_NULLABLE = ("const", "default", "examples")


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with every object closed that names properties and does not say what else it may have.

    Keywords that are null are left out, as if they were not there.
    """
    closed: dict[str, Any] = {}
    for key, value in schema.items():
        if value is None and key not in _NULLABLE:
            continue
        if key in _NAMED and isinstance(value, dict):
            value = {name: _closed(item) if isinstance(item, dict) else item for name, item in value.items()}
        elif key in _SCHEMAS and isinstance(value, dict):
            value = _closed(value)
        elif key in _SCHEMAS and isinstance(value, list):
            value = [_closed(item) if isinstance(item, dict) else item for item in value]
        closed[key] = value
    if closed.get("properties") and not any(key in closed for key in _OPEN):
        closed["additionalProperties"] = False
    return closed


def translate(source: GrammarSource) -> str:
    """The source in llguidance's Lark, without a header. May take long, like compiling what comes out.

    Raises:
        SourceError: it is not understood.
    """
    lark = _translated(source)
    if source.lead is Lead.NOTHING:
        return lark
    is_special = source.is_lead_special
    begin, end = THOUGHT_MARKS if is_special else map(json.dumps, THOUGHT_MARKS)
    lead = "thought GAP" if source.lead is Lead.THOUGHT else f"(GAP {begin} thought GAP)?"
    rules = [
        f"start: {lead} answer",
        f"thought: ANY {end}" if is_special else f"thought[lazy]: ANY {end}",
        r"ANY: /(.|\n)*/",
        r"GAP: /[ \n\r\t]{0,8}/",
    ]
    # A grammar of its own inside this one: whatever names its rules have.
    return "\n".join((*rules, f"answer: %lark {{\n{lark}\n}}"))


def _translated(source: GrammarSource) -> str:
    match source.kind:
        case GrammarKind.JSON_SCHEMA:
            return f"start: %json {source.text}"
        case GrammarKind.REGEX:
            return f"start: /{_delimited(source.text)}/"
        case GrammarKind.CHOICE:
            return _any_of(json.loads(source.text))
        case GrammarKind.GRAMMAR:
            return _from_client(source.text)
        case GrammarKind.LARK:
            return source.text


def _any_of(choices: list[str]) -> str:
    """One of these texts, as a single pattern: thousands of rules would be too many ways to read a text."""
    texts = [json.dumps(choice) for choice in choices if choice]
    start = " | ".join(["CHOICE"] * bool(texts) + ['""'] * ("" in choices))
    return f"start: {start}" + (f"\nCHOICE: {' | '.join(texts)}" if texts else "")


def _delimited(regex: str) -> str:
    from llguidance import regex_to_lark

    if not regex:
        return "(?:)"
    return regex_to_lark(regex).replace("\n", r"\n")


_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)


def _unescaped(escape: re.Match[str]) -> str:
    """The character of an escape that Lark has no such escape for, where it can stand for itself."""
    number = int(next((digits for digits in escape.groups() if digits), "0"), 16)
    is_character = 0 < number <= sys.maxunicode and not 0xD800 <= number < 0xE000
    return chr(number) if is_character and (chr(number).isalnum() or number > 0xA0) else escape[0]


def _from_client(text: str) -> str:
    from llguidance.gbnf_to_lark import RepetitionNode, gbnf_to_lark, is_lark_syntax

    if "%llguidance" in text:
        raise SourceError("a grammar may not set %llguidance options here")
    if is_lark_syntax(text):
        return text
    # The converter leaves out the parentheses of a repetition that is repeated: `("a"+)*` became `"a"+*`.
    RepetitionNode.is_atomic = lambda _: False  # type: ignore[method-assign,assignment]
    try:
        lark = gbnf_to_lark(_ESCAPE.sub(_unescaped, text))
    except Exception as error:  # the converter raises plain exceptions of many kinds
        raise SourceError(f"it is neither Lark nor GBNF: {error}"[:300]) from error
    lines = lark.splitlines()
    return "\n".join(line for line in lines if not line.startswith("%llguidance {}"))
