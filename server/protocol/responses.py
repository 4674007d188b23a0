"""`POST /v1/responses`: the Responses API of OpenAI."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from server.errors import InvalidRequestError
from server.protocol.chat import MessageIn, ReasoningEffort
from server.protocol.logprobs import MAX_TOP_LOGPROBS
from server.protocol.response_items import InputFunctionCall, InputFunctionCallOutput, InputItems, chat_messages
from server.protocol.sampling import MAX_TOKENS, GenerationFields
from server.protocol.structure import ResponseFormat, WantedGrammar
from server.protocol.tools import MAX_TOOLS, FunctionDefinition, FunctionName, ToolUse, check_tools, tool_use_of
from server.protocol.unsupported import refuse_unsupported
from server.protocol.usage import Usage
from server.protocol.wire import RequestModel

MAX_METADATA, MAX_USER_CHARACTERS = 16, 512
MAX_ECHO_BYTES = 1 << 20
MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
MAX_INSTRUCTIONS_CHARACTERS = 1 << 20
# Field -> values besides null that ask for nothing.
RESPONSE_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "conversation": (),
    "context_management": ([],),
    "moderation": (),
    "prompt": (),
}
LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = (
    LOGPROBS,
    # Of items that no answer here has, so there is never anything to include.
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
)


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


class FunctionTool(FunctionDefinition):
    """A function that the answer may call."""

    type: Literal["function"]
    """Only functions."""


class NamedFunctionTool(RequestModel):
    """This function and no other, exactly once."""

    type: Literal["function"]
    """Only functions."""
    name: FunctionName
    """Of one of the tools."""


def _tools(value: object) -> object:
    for tool in value if isinstance(value, list) else ():
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise InvalidRequestError(
                f"tools of type {kind[:50]!r} are not supported by this server",
                param="tools",
                code="unsupported_parameter",
            )
    return value


def _tool_choice(value: object) -> object:
    if value is None or (isinstance(value, str) and value in ("none", "auto", "required")):
        return value
    if isinstance(value, dict) and value.get("type") == "function":
        return NamedFunctionTool.model_validate(value)
    raise PydanticCustomError("tool_choice", 'must be "none", "auto", "required" or {"type": "function", "name": ...}')


def _include(values: list[str] | None) -> list[str] | None:
    if values is not None and any(value not in _INCLUDABLE for value in values):
        raise PydanticCustomError("include", "asks for something that no response of this API has")
    return values


def _check_echo(param: str, value: object) -> None:
    """Refuses what is too long to be kept with each response."""
    num_bytes = len(json.dumps(value))
    if num_bytes > MAX_ECHO_BYTES:
        raise InvalidRequestError(
            f"`{param}` has {num_bytes:,} bytes of JSON, which every response repeats; the limit is {MAX_ECHO_BYTES:,}",
            param=param,
            code="invalid_value",
        )


class Reasoning(RequestModel):
    """How much to think before answering."""

    effort: ReasoningEffort | None = None
    """`none`, or what the model's chat template understands; refused where it has no place for it."""
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Not supported: reasoning is reported in full."""

    @model_validator(mode="after")
    def _no_summary(self) -> Self:
        if self.summary not in (None, "auto"):
            raise InvalidRequestError(
                "`reasoning.summary` is not supported by this server", param="reasoning", code="unsupported_parameter"
            )
        return self


class ResponseGeneration(GenerationFields):
    """The part of a request that says how to generate."""

    shown_logprobs: int | None = None
    """How many of the most likely tokens are shown at each place; None: no log-probabilities are."""

    @property
    def num_top_logprobs(self) -> int | None:
        """See `GenerationFields`."""
        return self.shown_logprobs


class ResponseRequest(RequestModel):
    """Something to answer, alone or after an earlier response."""

    model: str | None = None
    """Name of the model; the one that is served if absent."""
    input: InputItems
    """A text, or a list of items: messages, calls of functions, their answers, what the model thought."""
    instructions: Annotated[str, StringConstraints(max_length=MAX_INSTRUCTIONS_CHARACTERS)] | None = None
    """A system message before the input. After `previous_response_id` those of earlier responses stay in force."""
    previous_response_id: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = None
    """A stored response to continue from; only what is new is computed."""
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """Most tokens of the answer; no limit if absent."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0: greedy decoding. Default 1."""
    top_p: float | None = Field(None, ge=0, le=1)
    """Sample from the fewest tokens that together have this probability. Default 1."""
    text: TextOptions | None = None
    """What the text must look like."""
    stream: bool | None = None
    """Send the answer as typed events while it grows."""
    stream_options: dict[str, Any] | None = None
    """Only with `stream`; there is nothing to choose."""
    store: bool | None = None
    """Keep the response, to be read and continued later (default true)."""
    background: bool | None = None
    """Answer at once and generate meanwhile; read the response later. Needs `store`."""
    truncation: Literal["auto", "disabled"] | None = None
    """Nothing is ever cut off here: there is no longest conversation."""
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=MAX_METADATA)
    """Up to 16 texts that come back with the response, of 512 characters under names of 64."""
    tools: Annotated[list[FunctionTool] | None, BeforeValidator(_tools), Field(max_length=MAX_TOOLS)] = None
    """Functions that the answer may call. They are not taken over from the previous response: name them again."""
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedFunctionTool | None,
        BeforeValidator(_tool_choice),
        WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}, {"type": "null"}]}),
    ] = None
    """`auto` (default): text, calls or both; `none`: only text; `required`: calls; or one function by its name."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may have several calls (default true)."""
    max_tool_calls: int | None = Field(None, ge=1)
    """Most calls of built-in tools, of which there are none here."""
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """Return the log-probability of each token of the text, and of that many most likely tokens in its place."""
    include: Annotated[list[str] | None, AfterValidator(_include), Field(max_length=20)] = None
    """What else to return; `message.output_text.logprobs`: the log-probability of each token of the text."""
    reasoning: Reasoning | None = None
    """How much to think before answering."""
    user: Annotated[str, StringConstraints(max_length=MAX_USER_CHARACTERS)] | None = None
    """Comes back with the response, and is without effect."""
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
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("`stream_options` is only allowed with `stream: true`", param="stream_options")
        check_tools([tool.name for tool in self.tools or ()], self._named_choice)
        _check_echo("tools", self.told_tools)
        _check_echo("text.format", None if self.text is None else self.text.format)
        if self.previous_response_id is None:
            self._check_calls()
        return self

    def _check_calls(self) -> None:
        """Refuses answers to calls that nobody has made."""
        calls: set[str] = set()
        for item in self.input:
            if isinstance(item, InputFunctionCall):
                calls.add(item.call_id)
            elif isinstance(item, InputFunctionCallOutput) and item.call_id not in calls:
                raise InvalidRequestError(
                    f"no call {item.call_id[:100]!r} comes before its output", param="input", code="invalid_value"
                )

    @property
    def messages(self) -> list[MessageIn]:
        """The instructions, if there are any, and the input."""
        own = [MessageIn(role="system", content=self.instructions)] if self.instructions is not None else []
        return own + chat_messages(self.input)

    @property
    def _named_choice(self) -> str | None:
        choice = self.tool_choice
        return f"function {choice.name}" if isinstance(choice, NamedFunctionTool) else choice

    @property
    def tool_use(self) -> ToolUse | None:
        """How tools are used; None: not at all."""
        return tool_use_of(
            tuple(self.tools or ()), self._named_choice, is_parallel=self.parallel_tool_calls is not False
        )

    @property
    def wanted_grammar(self) -> WantedGrammar | None:
        """What a text must look like; None: any text. Raises `InvalidRequestError`."""
        return None if self.text is None else self.text.wanted_grammar

    @property
    def told_tools(self) -> list[dict[str, Any]]:
        """The tools as a response repeats them."""
        names = ("type", "name", "description", "parameters")
        return [
            {**{name: getattr(tool, name) for name in names}, "strict": tool.strict is True}
            for tool in self.tools or ()
        ]

    @property
    def reasoning_effort(self) -> ReasoningEffort | None:
        """How much to think; None: as the model does by itself."""
        return None if self.reasoning is None else self.reasoning.effort

    @property
    def generation(self) -> ResponseGeneration:
        """How to generate."""
        wants_logprobs = LOGPROBS in (self.include or ()) or bool(self.top_logprobs)
        shown = (0 if self.top_logprobs is None else self.top_logprobs) if wants_logprobs else None
        return ResponseGeneration(
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            timeout=self.timeout,
            shown_logprobs=shown,
        )


def response_usage(usage: Usage) -> dict[str, Any]:
    """Token counts as this API spells them."""
    details = usage.completion_tokens_details
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0 if details is None else details.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
