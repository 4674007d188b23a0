"""What an answer must look like: `response_format` and vLLM's `structured_outputs`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from server.errors import InvalidRequestError
from server.grammar_check.sources import ANY_OBJECT, GrammarKind, GrammarSource, SourceError, schema_text
from server.protocol.wire import RequestModel

MAX_CHOICES = 4096
_UNSUPPORTED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "disable_additional_properties": (False,),
    "disable_any_whitespace": (False,),
    "structural_tag": (),
    "whitespace_pattern": (),
}


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


def with_structure(body: Any) -> Any:
    """A request body with `structured_outputs` for whatever it calls them; raises `InvalidRequestError` for two."""
    if not isinstance(body, dict):
        return body
    given = [name for name in STRUCTURE_NAMES if body.get(name) not in (None, "", {})]
    if not given:
        return body
    if len(given) > 1 or body.get("structured_outputs") is not None:
        others = [*given, "structured_outputs"][1]
        raise InvalidRequestError(
            f"`{given[0]}` and `{others}` exclude each other", param=given[0], code="invalid_value"
        )
    return {**body, "structured_outputs": {STRUCTURE_NAMES[given[0]]: body[given[0]]}}


@dataclass(frozen=True, slots=True)
class WantedGrammar:
    """A grammar, and the field of the request that it comes from."""

    source: GrammarSource
    param: str


class JsonSchemaFormat(RequestModel):
    """A JSON schema with a name."""

    name: str = Field(min_length=1, max_length=64)
    """Name of what is described; for people."""
    description: str | None = None
    """What it is for; not used here: say it in the messages."""
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    """The schema; any JSON object if absent."""
    strict: bool | None = None
    """Refuse keywords of the schema that cannot be kept to, instead of leaving them out of account."""


class ResponseFormat(RequestModel):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    """`text`: any (default); `json_object`: a JSON object; `json_schema`: JSON that follows `json_schema`."""
    json_schema: JsonSchemaFormat | None = None
    """Only with type `json_schema`."""

    @model_validator(mode="after")
    def _with_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("response_format", "`json_schema` and the type json_schema need each other")
        return self

    @property
    def wanted(self) -> WantedGrammar | None:
        """The grammar of such answers; None: any text.

        Raises:
            InvalidRequestError: the schema is nested too deeply.
        """
        if self.type == "text":
            return None
        schema = None if self.json_schema is None else self.json_schema.json_schema
        strict = self.json_schema is not None and self.json_schema.strict is True
        return _from_schema(ANY_OBJECT if schema is None else schema, strict=strict, param="response_format")


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
        return _from_schema(schema, strict=True, param="structured_outputs")


def wanted_grammar(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None
) -> WantedGrammar | None:
    """What a request wants of its answer; None: any text.

    Raises:
        InvalidRequestError: two things at once, or a schema that cannot be read.
    """
    wanted = None if response_format is None else response_format.wanted
    if structured_outputs is None:
        return wanted
    if wanted is not None:
        raise InvalidRequestError(
            "`response_format` and `structured_outputs` exclude each other",
            param="structured_outputs",
            code="invalid_value",
        )
    return structured_outputs.wanted


def _of(kind: GrammarKind, text: str) -> WantedGrammar:
    return WantedGrammar(GrammarSource(kind, text), "structured_outputs")


def _from_schema(schema: dict[str, Any], *, strict: bool, param: str) -> WantedGrammar:
    try:
        return WantedGrammar(GrammarSource(GrammarKind.JSON_SCHEMA, schema_text(schema, strict=strict)), param)
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
