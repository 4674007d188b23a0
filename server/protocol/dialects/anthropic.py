"""`POST /v1/messages`: the dialect of Anthropic's API, and what it is as a chat."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, FailFast, Field, Tag, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from server.errors import InvalidRequestError
from server.protocol.chat import MAX_MESSAGES, ChatRequest, MessageIn, ThinkingOption
from server.protocol.response_format import JsonSchemaFormat, ResponseFormat
from server.protocol.sampling import MAX_TOKENS
from server.protocol.tools import (
    MAX_TOOLS,
    FunctionCallIn,
    FunctionDefinition,
    FunctionName,
    NamedFunction,
    NamedToolChoice,
    Tool,
    ToolCallIn,
)
from server.protocol.wire import RequestModel, ResponseModel

MAX_BLOCKS = 10_000
MESSAGE_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": ({},),
    "mcp_servers": ([],),
}


class TextBlock(RequestModel):
    """A text."""

    type: Literal["text"]
    """Kind of the block."""
    text: str
    """The text."""


class ToolUseBlock(RequestModel):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    """Kind of the block."""
    id: str = Field(min_length=1, max_length=256)
    """Its id, which the result names."""
    name: FunctionName
    """Which tool."""
    input: dict[str, Any]
    """Its arguments."""


def _blocks_of_text(value: object) -> object:
    """A text as one block."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Texts = Annotated[
    list[TextBlock],
    BeforeValidator(_blocks_of_text),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
    Field(max_length=MAX_BLOCKS),
]


class ToolResultBlock(RequestModel):
    """What a tool has answered."""

    type: Literal["tool_result"]
    """Kind of the block."""
    tool_use_id: str = Field(min_length=1, max_length=256)
    """Which call this answers."""
    content: Texts | None = None
    """The text, or text blocks."""
    is_error: bool | None = None
    """Whether the tool failed; the text says how."""


class ThinkingBlock(RequestModel):
    """What the assistant thought before it answered."""

    type: Literal["thinking"]
    """Kind of the block."""
    thinking: str
    """The text."""
    signature: str | None = None
    """Not looked at."""


class RedactedThinkingBlock(RequestModel):
    """A thought that is not known here."""

    type: Literal["redacted_thinking"]
    """Kind of the block."""


Block = TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock
KINDS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")


def _kind(block: Any) -> Any:
    return block.get("type") if isinstance(block, dict) else getattr(block, "type", None)


def _known_blocks(value: object) -> object:
    for block in value if isinstance(value, list) else ():
        kind = _kind(block)
        if isinstance(kind, str) and kind not in KINDS:
            raise InvalidRequestError(
                f"content blocks of type {kind[:50]!r} are not supported by this server (no images, audio or files)",
                param="messages",
                code="unsupported_parameter",
            )
    return _blocks_of_text(value)


class AnthropicMessage(RequestModel):
    """One message."""

    role: Literal["user", "assistant"]
    """Who speaks."""
    content: Annotated[
        list[
            Annotated[
                Annotated[TextBlock, Tag("text")]
                | Annotated[ToolUseBlock, Tag("tool_use")]
                | Annotated[ToolResultBlock, Tag("tool_result")]
                | Annotated[ThinkingBlock, Tag("thinking")]
                | Annotated[RedactedThinkingBlock, Tag("redacted_thinking")],
                Discriminator(_kind),
            ]
        ],
        FailFast(),
        BeforeValidator(_known_blocks),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
        Field(max_length=MAX_BLOCKS),
    ]
    """A text, or blocks: `text`, `tool_use`, `tool_result`, `thinking`."""

    @property
    def chat(self) -> list[MessageIn]:
        """The same as messages of a chat: results of tools are messages of their own, before the text."""
        results = [
            MessageIn(role="tool", tool_call_id=block.tool_use_id, content=joined(block.content or ()))
            for block in self.content
            if isinstance(block, ToolResultBlock)
        ]
        texts = [block for block in self.content if isinstance(block, TextBlock)]
        calls = [
            ToolCallIn(
                id=block.id,
                type="function",
                function=FunctionCallIn(name=block.name, arguments=json.dumps(block.input, ensure_ascii=False)),
            )
            for block in self.content
            if isinstance(block, ToolUseBlock)
        ]
        if results and not texts and not calls:
            return results
        thought = "".join(block.thinking for block in self.content if isinstance(block, ThinkingBlock)) or None
        content = joined(texts)
        own = MessageIn(role=self.role, content=content, tool_calls=calls or None, reasoning_content=thought)
        return [*results, own]


def joined(blocks: Sequence[TextBlock]) -> str:
    """The texts of blocks, put together."""
    return "".join(block.text for block in blocks)


class AnthropicTool(RequestModel):
    """A tool that the answer may call."""

    type: Literal["custom"] | None = None
    """Only tools of the client's own."""
    name: FunctionName
    """Its name."""
    description: str | None = None
    """What it does, for the model."""
    input_schema: dict[str, Any]
    """JSON schema of its arguments, an object."""
    strict: bool | None = None
    """Have arguments follow the schema wherever it is called."""


def _tools(value: object) -> object:
    for tool in value if isinstance(value, list) else ():
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "custom":
            raise InvalidRequestError(
                f"tools of type {kind[:50]!r} are not supported by this server",
                param="tools",
                code="unsupported_parameter",
            )
    return value


class AnthropicToolChoice(RequestModel):
    """How tools are used."""

    type: Literal["auto", "any", "tool", "none"]
    """`auto` (default): text, calls or both; `any`: calls; `tool`: one call of `name`; `none`: only text."""
    name: FunctionName | None = None
    """With `tool`: which one."""
    disable_parallel_tool_use: bool | None = None
    """At most one call in an answer."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise PydanticCustomError("tool_choice", "`name` and the type tool need each other")
        return self


class OutputFormat(RequestModel):
    """The form of the answer."""

    type: Literal["json_schema"]
    """Only JSON that follows a schema."""
    json_schema: dict[str, Any] = Field(alias="schema")
    """The schema."""


class OutputConfig(RequestModel):
    """What the answer must look like."""

    format: OutputFormat | None = None
    """Its form."""


class PromptFields(RequestModel):
    """The conversation: what counting tokens and answering share."""

    refused = MESSAGE_FIELDS

    model: str | None = None
    """Name of the model; the one that is served if absent."""
    messages: Annotated[list[AnthropicMessage], FailFast()] = Field(min_length=1, max_length=MAX_MESSAGES)
    """The conversation. A last message of the assistant is continued."""
    system: Texts | None = None
    """What the model is to be: a text, or text blocks."""
    tools: Annotated[list[AnthropicTool] | None, BeforeValidator(_tools)] = Field(None, max_length=MAX_TOOLS)
    """Tools that the answer may call."""
    tool_choice: AnthropicToolChoice | None = None
    """How they are used."""
    thinking: ThinkingOption | None = None
    """Whether to think before answering, of models that can be told; the budget is without effect."""

    @property
    def chat_fields(self) -> dict[str, Any]:
        """The same as fields of a chat."""
        choice = self.tool_choice
        messages = [MessageIn(role="system", content=joined(self.system))] if self.system else []
        for message in self.messages:
            messages += message.chat
        last = messages[-1]
        named = None if choice is None or choice.name is None else NamedFunction(name=choice.name)
        modes = {"any": "required", "auto": "auto", "none": "none"}
        return {
            "model": self.model,
            "messages": messages,
            "continue_final_message": True if last.role == "assistant" and not last.tool_calls else None,
            "tools": [_tool(tool) for tool in self.tools or ()] or None,
            "tool_choice": modes[choice.type] if choice is not None and named is None else _named(named),
            "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
            "thinking": self.thinking,
        }


def _named(function: NamedFunction | None) -> NamedToolChoice | None:
    return None if function is None else NamedToolChoice(type="function", function=function)


def _tool(tool: AnthropicTool) -> Tool:
    function = FunctionDefinition(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )
    return Tool(type="function", function=function)


class CountTokensRequest(PromptFields):
    """A conversation whose tokens are counted."""

    @property
    def chat(self) -> ChatRequest:
        """The same as a chat."""
        return ChatRequest(**self.chat_fields)


class MessagesRequest(PromptFields):
    """A conversation to answer."""

    max_tokens: int = Field(ge=1, le=MAX_TOKENS)
    """Most tokens of the answer."""
    stop_sequences: list[str] | None = Field(None, max_length=256)
    """Texts that end the answer; not part of it."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0: greedy decoding; 1 (default): the model's own distribution."""
    top_p: float | None = Field(None, ge=0, le=1)
    """Sample from the smallest set of tokens whose probability reaches it."""
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS)
    """Sample from the k most likely tokens."""
    stream: bool | None = None
    """Send the answer as events while it grows."""
    output_format: OutputFormat | None = None
    """The form of the answer."""
    output_config: OutputConfig | None = None
    """Likewise, under its newer name."""

    @property
    def chat(self) -> ChatRequest:
        """The same as a chat."""
        wanted = self.output_format if self.output_config is None else self.output_config.format
        form = None
        if wanted is not None:
            schema = JsonSchemaFormat(name="answer", schema=wanted.json_schema, strict=True)
            form = ResponseFormat(type="json_schema", json_schema=schema)
        return ChatRequest(
            **self.chat_fields,
            max_tokens=self.max_tokens,
            stop=self.stop_sequences or None,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stream=self.stream,
            response_format=form,
        )


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class AnthropicUsage(ResponseModel):
    """Token counts."""

    input_tokens: int
    """Of the prompt, without those that were not computed again."""
    cache_creation_input_tokens: int
    """Always 0: what is kept costs nothing more."""
    cache_read_input_tokens: int
    """Of the prompt: those that were not computed again."""
    output_tokens: int
    """Generated."""
    cache_creation: None = None
    """Always null, as are the others below: of what is not here."""
    inference_geo: None = None
    """Always null."""
    output_tokens_details: None = None
    """Always null."""
    server_tool_use: None = None
    """Always null."""
    service_tier: None = None
    """Always null."""


class MessageOut(ResponseModel):
    """The answer."""

    id: str
    """`msg_...`."""
    type: Literal["message"]
    """Kind of this object."""
    role: Literal["assistant"]
    """Who speaks."""
    model: str
    """Name of the model that answered."""
    content: list[dict[str, Any]]
    """Blocks: `thinking`, `text`, `tool_use`."""
    stop_reason: StopReason | None
    """Why it ended."""
    stop_sequence: str | None
    """Which of `stop_sequences` was found."""
    usage: AnthropicUsage
    """Token counts."""
    stop_details: None = None
    """Always null."""
    container: None = None
    """Always null."""


class TokenCount(ResponseModel):
    """How long a conversation is."""

    input_tokens: int
    """Tokens of the rendered conversation."""
