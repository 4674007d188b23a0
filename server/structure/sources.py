"""Grammars as clients write them, and their translation into the one dialect that the engine takes."""

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

WHITESPACE = r" |\n {0,16}"
"""Between the parts of JSON: nothing, a space, or a new line with its indentation. Unbounded white space, which JSON
permits, is where small models go astray."""
ANY_OBJECT: dict[str, Any] = {"type": "object"}


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


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """A grammar before its translation."""

    kind: GrammarKind
    text: str


class SourceError(ValueError):
    """A source that is not even understood; the text is for the client who sent it."""


def schema_text(schema: dict[str, Any], *, strict: bool) -> str:
    """A JSON schema with the options that it is compiled by.

    Args:
        schema: as a client sent it.
        strict: keywords that cannot be kept to are an error, and not left out of account.

    Raises:
        SourceError: it is nested too deeply.
    """
    options = {"whitespace_pattern": WHITESPACE, "lenient": not strict}
    try:
        return json.dumps(schema | {"x-guidance": options}, separators=(",", ":"))
    except (RecursionError, ValueError) as error:
        raise SourceError("the schema is nested too deeply") from error


def translate(source: GrammarSource) -> str:
    """The source in llguidance's Lark, without a header. May take long, like compiling what comes out.

    Raises:
        SourceError: it is not understood.
    """
    match source.kind:
        case GrammarKind.JSON_SCHEMA:
            return f"start: %json {source.text}"
        case GrammarKind.REGEX:
            return f"start: /{_delimited(source.text)}/"
        case GrammarKind.CHOICE:
            return "start: " + " | ".join(json.dumps(choice) for choice in json.loads(source.text))
        case GrammarKind.GRAMMAR:
            return _from_client(source.text)
        case GrammarKind.LARK:
            return source.text


def _delimited(regex: str) -> str:
    from llguidance import regex_to_lark

    if not regex:
        return "(?:)"
    return regex_to_lark(regex).replace("\n", r"\n")


def _from_client(text: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    if "%llguidance" in text:
        raise SourceError("a grammar may not set %llguidance options here")
    try:
        lark = any_to_lark(text)
    except Exception as error:  # the converter raises plain exceptions of many kinds
        raise SourceError(f"it is neither Lark nor GBNF: {error}"[:300]) from error
    lines = lark.splitlines()
    return "\n".join(line for line in lines if not line.startswith("%llguidance {}"))
