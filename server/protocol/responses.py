"""`POST /v1/responses`: the Responses API of OpenAI."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from server.errors import InvalidRequestError
from server.protocol.chat import ChatRequest, MessageIn, ReasoningEffort
from server.protocol.logprobs import MAX_TOP_LOGPROBS
from server.protocol.response_format import ResponseFormat
from server.protocol.response_items import (
    ConversationId,
    InputFunctionCall,
    InputFunctionCallOutput,
    InputItems,
    chat_messages,
)
from server.protocol.sampling import MAX_TOKENS, SamplingFields
from server.protocol.tools import (
    MAX_TOOLS,
    AllowedTools,
    AllowedToolsChoice,
    FunctionDefinition,
    FunctionName,
    NamedFunction,
    NamedToolChoice,
    Tool,
)
from server.protocol.unsupported import RESPONSE_FIELDS
from server.protocol.usage import Usage
from server.protocol.wire import RequestModel

MAX_METADATA, MAX_USER_CHARACTERS = 16, 512
MAX_ECHO_BYTES = 1 << 20
MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
MAX_INSTRUCTIONS_CHARACTERS = 1 << 20
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
    def response_format(self) -> ResponseFormat | None:
        """The form as the chat API spells it; None: any text. Raises `InvalidRequestError`."""
        if self.format is None:
            return None
        try:
            return ResponseFormat.model_validate(self.format)
        except ValueError as error:
            raise InvalidRequestError(
                "`text.format` is not valid", param="text.format", code="invalid_value"
            ) from error


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

    @property
    def chat(self) -> NamedToolChoice:
        """As the chat API spells it."""
        return NamedToolChoice(type="function", function=NamedFunction(name=self.name))


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


class AllowedFunctionTools(RequestModel):
    """These functions and no others; the prompt still names all."""

    type: Literal["allowed_tools"]
    """Kind of the choice."""
    mode: Literal["auto", "required"]
    """Whether one of them must be called."""
    tools: list[NamedFunctionTool] = Field(min_length=1, max_length=MAX_TOOLS)
    """Which ones."""

    @property
    def chat(self) -> AllowedToolsChoice:
        """As the chat API spells it."""
        allowed = AllowedTools(mode=self.mode, tools=[tool.chat for tool in self.tools])
        return AllowedToolsChoice(type="allowed_tools", allowed_tools=allowed)


def _tool_choice(value: object) -> object:
    if value is None or (isinstance(value, str) and value in ("none", "auto", "required")):
        return value
    if isinstance(value, dict) and value.get("type") == "function":
        return NamedFunctionTool.model_validate(value)
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        return AllowedFunctionTools.model_validate(value)
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
    """`none`, or what the model's chat template understands; without effect where it has no place for it."""
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Without effect: reasoning is reported in full."""
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    """The same under its older name."""


class ResponseRequest(SamplingFields):
    """Something to answer, alone or after an earlier response."""

    refused = RESPONSE_FIELDS

    model: str | None = None
    """Name of the model; the one that is served if absent."""
    input: InputItems
    """A text, or a list of items: messages, calls of functions, their answers, what the model thought."""
    instructions: Annotated[str, StringConstraints(max_length=MAX_INSTRUCTIONS_CHARACTERS)] | None = None
    """A system message before the input. After `previous_response_id` those of earlier responses stay in force."""
    previous_response_id: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = None
    """A stored response to continue from; only what is new is computed."""
    conversation: ConversationId | None = None
    """A conversation of `/v1/conversations` to answer and to extend."""
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """Most tokens of the answer; no limit if absent."""
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
    tools: Annotated[list[FunctionTool] | None, BeforeValidator(_tools)] = Field(None, max_length=MAX_TOOLS)
    """Functions that the answer may call. They are not taken over from the previous response: name them again."""
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedFunctionTool | AllowedFunctionTools | None,
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
    include: Annotated[list[str] | None, AfterValidator(_include)] = Field(None, max_length=20)
    """What else to return; `message.output_text.logprobs`: the log-probability of each token of the text."""
    reasoning: Reasoning | None = None
    """How much to think before answering."""
    user: str | None = Field(None, max_length=MAX_USER_CHARACTERS)
    """Without effect; comes back with the response, like the three that follow."""
    safety_identifier: str | None = Field(None, max_length=MAX_USER_CHARACTERS)
    """Without effect."""
    prompt_cache_key: str | None = Field(None, max_length=MAX_USER_CHARACTERS)
    """Without effect: prefixes are found by themselves."""
    service_tier: str | None = Field(None, max_length=64)
    """Without effect."""
    cache_prompt: bool | None = None
    """Use and fill the prefix cache (default true)."""
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    """Cached prefixes are shared only among requests of the same key with the same salt."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.background and self.store is False:
            raise InvalidRequestError("`background` needs `store`: the answer is read later", param="background")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("`stream_options` is only allowed with `stream: true`", param="stream_options")
        _check_echo("tools", self.echoed_tools)
        _check_echo("text.format", None if self.text is None else self.text.format)
        if self.previous_response_id is not None and self.conversation is not None:
            raise InvalidRequestError(
                "`conversation` and `previous_response_id` exclude each other",
                param="conversation",
                code="invalid_value",
            )
        if self.previous_response_id is None and self.conversation is None:
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
        return self.instruction_messages + chat_messages(self.input)

    @property
    def instruction_messages(self) -> list[MessageIn]:
        """The instructions, if there are any."""
        return [MessageIn(role="system", content=self.instructions)] if self.instructions is not None else []

    @property
    def echoed_tools(self) -> list[dict[str, Any]]:
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

    def chat(self, *, seed: int, messages: list[MessageIn]) -> ChatRequest:
        """The same as a request of the chat API with these messages."""
        wants_logprobs = LOGPROBS in (self.include or ()) or bool(self.top_logprobs)
        choice = self.tool_choice
        return ChatRequest(
            messages=messages,
            model=self.model,
            max_completion_tokens=self.max_output_tokens,
            **{name: getattr(self, name) for name in SamplingFields.model_fields} | {"seed": seed},
            logprobs=wants_logprobs,
            top_logprobs=(self.top_logprobs or 0) if wants_logprobs else None,
            tools=[Tool(type="function", function=tool) for tool in self.tools or ()] or None,
            tool_choice=choice.chat if isinstance(choice, NamedFunctionTool | AllowedFunctionTools) else choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=None if self.text is None else self.text.response_format,
            reasoning_effort=self.reasoning_effort,
            cache_prompt=self.cache_prompt,
            cache_salt=self.cache_salt,
            stream=self.stream,
        )


FIELD_NAMES: Mapping[str, str] = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning",
    "response_format": "text.format",
}
"""What is called otherwise in `ResponseRequest.chat`."""


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
