"""`POST /v1/responses`: the Responses API of OpenAI."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from server.errors import InvalidRequestError
from server.protocol.chat import MAX_MESSAGES, MessageIn
from server.protocol.sampling import MAX_TOKENS
from server.protocol.structure import ResponseFormat, WantedGrammar
from server.protocol.unsupported import refuse_unsupported
from server.protocol.usage import Usage
from server.protocol.wire import RequestModel

MAX_METADATA = 16
MAX_INSTRUCTIONS_CHARACTERS = 1 << 20
# Field -> values besides null that ask for nothing.
RESPONSE_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "conversation": (),
    "context_management": ([],),
    "include": ([],),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    "reasoning": ({},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
_TEXT_PARTS = ("input_text", "output_text", "text")


def _content(value: object) -> object:
    """A text, or text parts put together."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or a list of text parts")
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise PydanticCustomError(
                "content", "only parts of type 'input_text' and 'output_text' are supported (no images, audio or files)"
            )
        texts.append(text)
    return "".join(texts)


class InputItem(RequestModel):
    """One message of the input."""

    type: Literal["message"] = "message"
    """Kind of the item; only messages are supported."""
    role: Literal["user", "assistant", "system", "developer"]
    """Who speaks."""
    content: Annotated[
        str, BeforeValidator(_content), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array"}]})
    ]
    """The text, or a list of text parts, which are put together."""

    @model_validator(mode="before")
    @classmethod
    def _known_items(cls, item: Any) -> Any:
        kind = item.get("type") if isinstance(item, dict) else None
        if isinstance(kind, str) and kind != "message":
            raise InvalidRequestError(
                f"input items of type {kind[:50]!r} are not supported by this server",
                param="input",
                code="unsupported_parameter",
            )
        return item


def _items(value: object) -> object:
    """A text is one message of the user."""
    if isinstance(value, str):
        if not value:
            raise PydanticCustomError("input", "is empty")
        return [{"role": "user", "content": value}]
    return value


class TextOptions(RequestModel):
    """What the text must look like."""

    format: dict[str, Any] | None = None
    """`{"type": "text"}`, `{"type": "json_object"}`, or `{"type": "json_schema", "name": ..., "schema": ...}`."""
    verbosity: Literal["medium"] | None = None
    """Only the default."""

    @property
    def wanted_grammar(self) -> WantedGrammar | None:
        """The grammar of such answers; None: any text. Raises `InvalidRequestError`."""
        if self.format is None:
            return None
        wanted = dict(self.format)
        if wanted.get("type") == "json_schema" and "json_schema" not in wanted:
            wanted = {"type": "json_schema", "json_schema": {k: v for k, v in wanted.items() if k != "type"}}
        try:
            grammar = ResponseFormat.model_validate(wanted).wanted
        except ValueError as error:
            raise InvalidRequestError(
                "`text.format` is not valid", param="text.format", code="invalid_value"
            ) from error
        return None if grammar is None else replace(grammar, param="text.format")


class ResponseRequest(RequestModel):
    """Something to answer, alone or after an earlier response."""

    model: str | None = None
    """Name of the model; the one that is served if absent."""
    input: Annotated[
        list[InputItem],
        BeforeValidator(_items),
        WithJsonSchema(
            {"anyOf": [{"type": "string"}, {"type": "array", "items": {"$ref": "#/components/schemas/InputItem"}}]}
        ),
    ] = Field(min_length=1, max_length=MAX_MESSAGES)
    """A text, or a list of messages."""
    instructions: Annotated[str, StringConstraints(max_length=MAX_INSTRUCTIONS_CHARACTERS)] | None = None
    """A system message before the input. After `previous_response_id` those of earlier responses stay in force."""
    previous_response_id: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = None
    """A stored response to go on from; only what is new is computed."""
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """Most tokens of the answer; no limit if absent."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 always takes the likeliest token. Default 1."""
    top_p: float | None = Field(None, ge=0, le=1)
    """Choose among the likeliest tokens up to this probability. Default 1."""
    text: TextOptions | None = None
    """What the text must look like."""
    stream: bool | None = None
    """Send the answer as typed events while it grows."""
    stream_options: dict[str, Any] | None = None
    """Accepted with `stream`; there is nothing to choose."""
    store: bool | None = None
    """Keep the response, to be read again and gone on from (default true)."""
    background: bool | None = None
    """Answer at once and generate meanwhile; read the response later. Needs `store`."""
    truncation: Literal["auto", "disabled"] | None = None
    """Nothing is ever cut off here: there is no longest conversation."""
    metadata: dict[str, str] | None = Field(None, max_length=MAX_METADATA)
    """Up to 16 texts that come back with the response."""
    parallel_tool_calls: bool | None = None
    """Without effect, as there are no tools."""
    user: str | None = None
    """Without effect."""
    cache_prompt: bool | None = None
    """Use and fill the prefix cache (default true)."""
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    """Cached prefixes are shared only among requests of the same key with the same salt."""
    timeout: float | None = Field(None, gt=0, le=86400)
    """Seconds after which the request ends with an error."""

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, body: Any) -> Any:
        refuse_unsupported(body, RESPONSE_FIELDS)
        return body

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.background and self.store is False:
            raise InvalidRequestError("`background` needs `store`: the answer is read later", param="background")
        if self.background and self.stream:
            raise InvalidRequestError(
                "`background` with `stream` is not supported by this server",
                param="background",
                code="unsupported_parameter",
            )
        return self

    @property
    def messages(self) -> list[MessageIn]:
        """The instructions, if there are any, and the input."""
        own = [MessageIn(role="system", content=self.instructions)] if self.instructions is not None else []
        return own + [MessageIn(role=item.role, content=item.content) for item in self.input]


def response_usage(usage: Usage) -> dict[str, Any]:
    """Token counts as this API spells them."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
