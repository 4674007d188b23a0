"""What an answer must look like: `response_format`, as OpenAI and other servers document it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.errors import InvalidRequestError
from server.grammar_check.sources import ANY_OBJECT, GrammarKind, GrammarSource
from server.protocol.structure import StructuredOutputs, WantedGrammar, from_schema
from server.protocol.wire import RequestModel

_TRUTHS = {"true": True, "false": False}


def _truth(value: Any) -> Any:
    """LM Studio documents `"strict": "true"`."""
    return _TRUTHS.get(value, value) if isinstance(value, str) else value


class JsonSchemaFormat(RequestModel):
    """A JSON schema with a name."""

    name: str = Field("answer", min_length=1, max_length=64)
    """Name of what is described; for people."""
    description: str | None = None
    """What it is for; not used here: say it in the messages."""
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    """The schema; any JSON object if absent."""
    strict: Annotated[bool | None, BeforeValidator(_truth)] = None
    """Refuse keywords of the schema that cannot be kept to, instead of leaving them out of account."""

    @model_validator(mode="after")
    def _not_the_schema_itself(self) -> Self:
        if self.json_schema is None and "name" not in self.model_fields_set:
            raise PydanticCustomError("json_schema", "needs `schema` with the schema, or at least a `name`")
        return self


class ResponseFormat(RequestModel):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    """`text`: any (default); `json_object`: a JSON object; `json_schema`: JSON that follows `json_schema`; `regex`: a
    text that all of `pattern` matches; `grammar`: a text of `grammar`."""
    json_schema: JsonSchemaFormat | None = None
    """Only with type `json_schema`."""
    pattern: str | None = None
    """Only with type `regex`: a regular expression (Rust's syntax, without look-around)."""
    grammar: str | None = None
    """Only with type `grammar`: in Lark or GBNF."""

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, body: Any) -> Any:
        return _spelled(body) if isinstance(body, dict) else body

    @model_validator(mode="after")
    def _with_its_form(self) -> Self:
        for kind, name in (("json_schema", "json_schema"), ("regex", "pattern"), ("grammar", "grammar")):
            if (self.type == kind) != (getattr(self, name) is not None):
                raise PydanticCustomError("response_format", f"`{name}` and the type {kind} need each other")
        return self

    @property
    def wanted(self) -> WantedGrammar | None:
        """The grammar of such answers; None: any text.

        Raises:
            InvalidRequestError: the schema is nested too deeply.
        """
        if self.type == "text":
            return None
        if self.pattern is not None:
            return WantedGrammar(GrammarSource(GrammarKind.REGEX, self.pattern), "response_format")
        if self.grammar is not None:
            return WantedGrammar(GrammarSource(GrammarKind.GRAMMAR, self.grammar), "response_format")
        schema = None if self.json_schema is None else self.json_schema.json_schema
        strict = self.json_schema is not None and self.json_schema.strict is True
        return from_schema(ANY_OBJECT if schema is None else schema, strict=strict, param="response_format")


def _spelled(body: dict[str, Any]) -> dict[str, Any]:
    """A form as this module's types have it.

    Together and llama.cpp have `schema` beside the type, with `json_object` too; TGI has `value`, and a type `json`.
    The Responses API has the schema's name beside the type as well.
    """
    form = {name: value for name, value in body.items() if value is not None}
    kind = form.get("type")
    if kind == "structural_tag":
        raise InvalidRequestError(
            "`response_format` of the type structural_tag is not supported by this server",
            param="response_format",
            code="unsupported_parameter",
        )
    value = form.pop("value", None)
    if kind == "regex" and value is not None:
        return {"pattern": value, **form}
    if kind not in ("json", "json_object", "json_schema") or "json_schema" in form:
        return form
    if value is not None:
        is_named = isinstance(value, Mapping) and isinstance(value.get("schema"), Mapping)
        form = {**form, **(value if is_named else {"schema": value})}
    if "schema" not in form:
        return form
    named = {name: item for name, item in form.items() if name not in ("type", "json_schema")}
    return {"type": "json_schema", "json_schema": named}


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
