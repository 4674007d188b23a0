"""Items of the Responses API, what a conversation consists of, and `/v1/conversations`, which keeps them."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, FailFast, Field, StringConstraints, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.errors import InvalidRequestError
from server.protocol.chat import MAX_MESSAGES, MessageIn
from server.protocol.tools import FunctionCallIn, FunctionName, ToolCallIn
from server.protocol.wire import RequestModel

KINDS = ("message", "function_call", "function_call_output", "reasoning")
MAX_ITEMS_AT_ONCE = 20
_TEXT_PARTS = ("input_text", "output_text", "text")
CallId = Annotated[str, StringConstraints(min_length=1, max_length=256)]


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


Content = Annotated[str, BeforeValidator(_content), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array"}]})]


class InputMessage(RequestModel):
    """One message."""

    type: Literal["message"] = "message"
    """Kind of the item; may be absent."""
    role: Literal["user", "assistant", "system", "developer"]
    """Who speaks."""
    content: Content
    """The text, or a list of text parts, which are put together."""


class InputFunctionCall(RequestModel):
    """A call that the model made earlier, as it was answered."""

    type: Literal["function_call"]
    """Kind of the item."""
    call_id: CallId
    """Its id, which the function's answer names."""
    name: FunctionName
    """Which function."""
    arguments: str
    """Its arguments, the text of a JSON object."""


class InputFunctionCallOutput(RequestModel):
    """What a function has answered."""

    type: Literal["function_call_output"]
    """Kind of the item."""
    call_id: CallId
    """Which call this answers."""
    output: Content
    """The text, or a list of text parts, which are put together."""


class ReasoningText(RequestModel):
    """A piece of what the model thought."""

    type: Literal["reasoning_text", "summary_text"]
    """Kind of the part."""
    text: str
    """The text."""


class InputReasoning(RequestModel):
    """What the model thought before it answered. The model reads it again if its chat template has a place for it."""

    type: Literal["reasoning"]
    """Kind of the item."""
    summary: list[ReasoningText] | None = None
    """In short."""
    content: list[ReasoningText] | None = None
    """In full; wins over `summary`."""

    @property
    def text(self) -> str:
        """All of it."""
        parts = self.content if self.content else self.summary
        return "".join(part.text for part in parts or ())


InputItem = InputMessage | InputFunctionCall | InputFunctionCallOutput | InputReasoning


def _kind(item: Any) -> str:
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")


def _items(value: object) -> object:
    """A text is one message of the user."""
    if isinstance(value, str):
        if not value:
            raise PydanticCustomError("input", "is empty")
        return [{"role": "user", "content": value}]
    for item in value if isinstance(value, list) else ():
        kind = item.get("type") if isinstance(item, dict) else None
        if isinstance(kind, str) and kind not in KINDS:
            raise InvalidRequestError(
                f"input items of type {kind[:50]!r} are not supported by this server",
                param="input",
                code="unsupported_parameter",
            )
        if not isinstance(item, dict) or not isinstance(kind, str | None):
            raise PydanticCustomError("input", "must be a text or a list of items")
    return value


_Tagged = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputFunctionCall, Tag("function_call")]
    | Annotated[InputFunctionCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_kind),
]
InputItems = Annotated[
    list[_Tagged],
    FailFast(),
    BeforeValidator(_items),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
    Field(min_length=1, max_length=MAX_MESSAGES),
]
FewInputItems = Annotated[
    list[_Tagged],
    FailFast(),
    BeforeValidator(lambda value: [] if value is None else _items(value)),
    WithJsonSchema({"type": "array", "items": {"type": "object"}}),
    Field(max_length=MAX_ITEMS_AT_ONCE),
]


def chat_messages(items: Sequence[InputItem]) -> list[MessageIn]:
    """The same conversation as messages of a chat: calls belong to the assistant's message before them."""
    messages: list[MessageIn] = []
    thought: str | None = None
    for item in items:
        match item:
            case InputMessage():
                reasoning = thought if item.role == "assistant" else None
                messages.append(MessageIn(role=item.role, content=item.content, reasoning_content=reasoning))
            case InputFunctionCall():
                function = FunctionCallIn(name=item.name, arguments=item.arguments)
                _add_call(messages, ToolCallIn(id=item.call_id, type="function", function=function), thought)
            case InputFunctionCallOutput():
                messages.append(MessageIn(role="tool", content=item.output, tool_call_id=item.call_id))
            case InputReasoning():
                thought = item.text or None
                continue
        thought = None
    return messages


def _add_call(messages: list[MessageIn], call: ToolCallIn, thought: str | None) -> None:
    last = messages[-1] if messages else None
    if last is None or last.role != "assistant" or thought is not None:
        messages.append(MessageIn(role="assistant", tool_calls=[call], reasoning_content=thought))
    else:
        messages[-1] = last.model_copy(update={"tool_calls": [*(last.tool_calls or ()), call]})


def stored_item(item: InputItem, number: int, suffix: str) -> dict[str, Any]:
    """An input item as it is read again.

    Args:
        number: of the item in its input.
        suffix: what its id has in common with the response's.
    """
    place = f"{suffix}_{number}"
    match item:
        case InputMessage():
            kind = "output_text" if item.role == "assistant" else "input_text"
            part: dict[str, Any] = {"type": kind, "text": item.content}
            more: dict[str, Any] = {"annotations": [], "logprobs": []} if item.role == "assistant" else {}
            return {
                "id": f"msg_{place}",
                "type": "message",
                "status": "completed",
                "role": item.role,
                "content": [part | more],
            }
        case InputFunctionCall():
            return {"id": f"fc_{place}", "status": "completed", **item.model_dump()}
        case InputFunctionCallOutput():
            return {"id": f"fco_{place}", "status": "completed", **item.model_dump()}
        case InputReasoning():
            return {"id": f"rs_{place}", "status": "completed", **item.model_dump(exclude_none=True)} | {
                "summary": [part.model_dump() for part in item.summary or ()]
            }


def page_of_items(
    items: Sequence[Mapping[str, Any]], *, limit: int, order: Literal["asc", "desc"], after: str | None
) -> dict[str, Any]:
    """A page of stored items, behind the item `after`; raises `InvalidRequestError` if there is none of that id."""
    found = list(items) if order == "asc" else list(items)[::-1]
    if after is not None:
        ids = [item["id"] for item in found]
        if after not in ids:
            raise InvalidRequestError(f"there is no item {after!r}", param="after", code="invalid_value")
        found = found[ids.index(after) + 1 :]
    page = found[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return {"object": "list", "data": page, "has_more": len(found) > limit, **ends}


MAX_METADATA = 16
Metadata = dict[
    Annotated[str, StringConstraints(max_length=64)],
    Annotated[str, StringConstraints(max_length=512)],
]


def _conversation_id(value: object) -> object:
    if isinstance(value, dict):
        value = value.get("id")
        if not isinstance(value, str):
            raise PydanticCustomError("conversation", "must be an id, or an object with an `id`")
    return value


ConversationId = Annotated[
    Annotated[str, StringConstraints(min_length=1, max_length=100)],
    BeforeValidator(_conversation_id),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]}),
]
"""`"conv_..."` or `{"id": "conv_..."}`."""


class CreateConversation(RequestModel):
    """A new conversation."""

    items: FewInputItems = Field(default_factory=list)
    """What it begins with, at most 20 items."""
    metadata: Metadata | None = Field(None, max_length=MAX_METADATA)
    """Up to 16 texts that come back with it."""


class UpdateConversation(RequestModel):
    """What may be changed of a conversation besides its items."""

    metadata: Metadata = Field(max_length=MAX_METADATA)
    """In place of what there was."""


class CreateItems(RequestModel):
    """More items."""

    items: FewInputItems
    """At the end of the conversation, at most 20."""


def conversation_object(conversation_id: str, created: float, metadata: Any) -> dict[str, Any]:
    """As it is on the wire."""
    return {
        "id": conversation_id,
        "object": "conversation",
        "created_at": int(created),
        "metadata": {} if metadata is None else metadata,
    }
