"""What an answer must look like: vLLM's `structured_outputs`, and other servers' names for it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from server.errors import InvalidRequestError
from server.grammar_check.sources import ANY_OBJECT, GrammarKind, GrammarSource, SourceError, schema_text
from server.protocol.wire import RequestModel

MAX_CHOICES = 4096
MAX_PATTERN_CHARACTERS = 256
_UNSUPPORTED_OPTIONS: dict[str, tuple[Any, ...]] = {"structural_tag": ()}
_NOTHING: tuple[Any, ...] = (None, "", {})


STRUCTURE_NAMES: Mapping[str, str] = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "regex": "regex",
    "ebnf": "grammar",
    "grammar": "grammar",
    "json_schema": "json",
}
"""Fields of vLLM (earlier), SGLang and llama.cpp, and what they are in `structured_outputs`."""
_WHITESPACE = "guided_whitespace_pattern"
_NVIDIA = "nvext"
OTHER_NAMES: Mapping[str, str] = {**STRUCTURE_NAMES, _WHITESPACE: "whitespace_pattern", _NVIDIA: ""}
"""All fields of a request that `with_structure` reads."""


def with_structure(body: Any) -> Any:
    """A request body with `structured_outputs` for whatever it calls them; raises `InvalidRequestError` for two."""
    if not isinstance(body, dict):
        return body
    body = _without_nvidia(body)
    given = [name for name in STRUCTURE_NAMES if name in body and not _is_nothing(name, body[name])]
    if not given:
        return body
    if len(given) > 1 or body.get("structured_outputs") is not None:
        others = [*given, "structured_outputs"][1]
        raise InvalidRequestError(
            f"`{given[0]}` and `{others}` exclude each other", param=given[0], code="invalid_value"
        )
    wanted = {STRUCTURE_NAMES[given[0]]: body[given[0]]}
    if body.get(_WHITESPACE) is not None:
        wanted["whitespace_pattern"] = body[_WHITESPACE]
    return {**body, "structured_outputs": wanted}


def _is_nothing(name: str, value: Any) -> bool:
    """An empty schema is one: any JSON follows it."""
    return value in _NOTHING and not (value == {} and STRUCTURE_NAMES[name] == "json")


def _without_nvidia(body: dict[str, Any]) -> dict[str, Any]:
    """The same with the fields `guided_*` of NVIDIA's `nvext` where vLLM has them."""
    inner = body.get(_NVIDIA)
    if not isinstance(inner, dict):
        return body
    wanted = {name: value for name, value in inner.items() if value is not None}
    known = {name for name in (*STRUCTURE_NAMES, _WHITESPACE) if name.startswith("guided_")}
    for name in wanted:
        if name not in {*known, "guided_decoding_backend"} or name in body:
            raise InvalidRequestError(
                f"`nvext.{name[:64]}` is not supported: the request itself has a field for it, if there is one",
                param=f"nvext.{name[:64]}",
                code="unsupported_parameter",
            )
    return {**body, **wanted}


@dataclass(frozen=True, slots=True)
class WantedGrammar:
    """A grammar, and the field of the request that it comes from."""

    source: GrammarSource
    param: str


class StructuredOutputs(RequestModel):
    """The form of the answer in one of several languages, as vLLM takes it; exactly one."""

    refused = _UNSUPPORTED_OPTIONS

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    """A JSON schema, as an object or as text."""
    json_object: bool | None = None
    """Any JSON object."""
    regex: str | None = None
    """A regular expression (Rust's syntax, without look-around) that the whole answer matches."""
    choice: list[str] | None = Field(None, min_length=1, max_length=MAX_CHOICES)
    """The texts that the answer may be."""
    grammar: str | None = None
    """A grammar in Lark or GBNF."""
    whitespace_pattern: str | None = Field(None, max_length=MAX_PATTERN_CHARACTERS)
    """With JSON: a regular expression of the white space between its parts."""
    disable_any_whitespace: bool | None = None
    """With JSON: no white space at all."""
    disable_additional_properties: bool | None = None
    """Without effect: objects that name properties have no others unless the schema says so."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [self.json_schema, self.json_object or None, self.regex, self.choice, self.grammar]
        if sum(value is not None for value in given) != 1:
            raise PydanticCustomError(
                "structured_outputs", "needs exactly one of json, json_object, regex, choice and grammar"
            )
        return self

    @property
    def wanted(self) -> WantedGrammar:
        """The grammar of such answers.

        Raises:
            InvalidRequestError: `json` is no JSON, or nested too deeply.
        """
        if self.regex is not None:
            return _of(GrammarKind.REGEX, self.regex)
        if self.choice is not None:
            return _of(GrammarKind.CHOICE, json.dumps(self.choice))
        if self.grammar is not None:
            return _of(GrammarKind.GRAMMAR, self.grammar)
        schema = ANY_OBJECT if self.json_schema is None else _parsed(self.json_schema)
        whitespace = "" if self.disable_any_whitespace else self.whitespace_pattern
        return from_schema(schema, strict=True, param="structured_outputs", whitespace=whitespace)


def _of(kind: GrammarKind, text: str) -> WantedGrammar:
    return WantedGrammar(GrammarSource(kind, text), "structured_outputs")


def from_schema(schema: dict[str, Any], *, strict: bool, param: str, whitespace: str | None = None) -> WantedGrammar:
    """The grammar of JSON that follows a schema.

    Args:
        whitespace: see `schema_text`.

    Raises:
        InvalidRequestError: the schema is nested too deeply.
    """
    try:
        text = schema_text(schema, strict=strict, whitespace=whitespace)
        return WantedGrammar(GrammarSource(GrammarKind.JSON_SCHEMA, text), param)
    except SourceError as error:
        raise InvalidRequestError(f"{param}: {error}", param=param, code="invalid_value") from error


def _parsed(schema: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(schema, dict):
        return schema
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise InvalidRequestError(
            "structured_outputs.json: is not the text of a JSON object",
            param="structured_outputs",
            code="invalid_value",
        )
    return parsed
