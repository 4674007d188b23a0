"""`/api/`: the dialect of Ollama, and what it is as a chat or a completion."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, FailFast, Field, WithJsonSchema

from server.errors import InvalidRequestError
from server.protocol.chat import MAX_MESSAGES, ChatRequest, MessageIn
from server.protocol.completions import CompletionRequest
from server.protocol.response_format import JsonSchemaFormat, ResponseFormat
from server.protocol.tools import MAX_TOOLS, FunctionCallIn, FunctionName, Tool, ToolCallIn
from server.protocol.wire import RequestModel, ResponseModel

LATEST = ":latest"
_OPTIONS: Mapping[str, str] = {
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "stop")},
    **{name: name for name in ("presence_penalty", "frequency_penalty")},
}
"""Options that shape the answer, and their names here."""
_REFUSED: Mapping[str, tuple[Any, ...]] = {"mirostat": (0,), "tfs_z": (1, 1.0), "penalize_newline": (False, True)}


class OllamaOptions(RequestModel):
    """Sampling and limits; what is about memory and threads is without effect."""

    refused = _REFUSED

    num_predict: int | None = Field(None, ge=-2)
    """Most tokens of the answer; negative: no limit."""
    temperature: float | None = None
    """0: greedy decoding."""
    top_p: float | None = None
    """Sample from the smallest set of tokens whose probability reaches it."""
    top_k: int | None = None
    """Sample from the k most likely tokens."""
    min_p: float | None = None
    """Leave out tokens less likely than this fraction of the most likely."""
    typical_p: float | None = None
    """Sample from the tokens that surprise about as much as is to be expected."""
    seed: int | None = None
    """Equal seeds give equal answers."""
    stop: list[str] | str | None = None
    """Texts that end the answer."""
    repeat_penalty: float | None = None
    """Above 1: tokens already in prompt or answer become less likely."""
    presence_penalty: float | None = None
    """Subtracted once from the logit of each token already in the answer."""
    frequency_penalty: float | None = None
    """Subtracted as often as the token is in the answer."""

    @property
    def fields(self) -> dict[str, Any]:
        """The same as fields of a request here."""
        named = {name: getattr(self, own) for own, name in _OPTIONS.items()}
        if self.num_predict is not None and self.num_predict < 0:
            named["max_tokens"] = None
        return named


class OllamaFields(RequestModel):
    """What both generating endpoints share."""

    model: str | None = None
    """Name of the model; `:latest` may follow."""
    format: Annotated[
        dict[str, Any] | Literal["json", ""] | None,
        WithJsonSchema({"anyOf": [{"type": "object"}, {"const": "json"}, {"type": "null"}]}),
    ] = None
    """The form of the answer: `json`, or a JSON schema."""
    options: OllamaOptions | None = None
    """Sampling and limits."""
    stream: bool | None = None
    """Send the answer line by line while it grows (default true)."""
    think: bool | Literal["low", "medium", "high"] | None = None
    """Whether, or how much, to think before answering."""

    @property
    def name(self) -> str | None:
        """The model without its tag."""
        return None if self.model is None else self.model.removesuffix(LATEST)

    @property
    def shared(self) -> dict[str, Any]:
        """The same as fields of a request here."""
        form = ResponseFormat(type="json_object") if self.format == "json" else None
        if isinstance(self.format, dict):
            schema = JsonSchemaFormat(name="answer", schema=self.format)
            form = ResponseFormat(type="json_schema", json_schema=schema)
        options = OllamaOptions() if self.options is None else self.options
        return {"model": self.name, "stream": self.stream is not False, "response_format": form, **options.fields}

    @property
    def thinking(self) -> dict[str, Any]:
        """Likewise, of chats alone."""
        if isinstance(self.think, str):
            return {"reasoning_effort": self.think}
        return {"enable_thinking": self.think}


class OllamaFunction(RequestModel):
    """A call that was made."""

    name: FunctionName
    """Which function."""
    arguments: dict[str, Any]
    """Its arguments."""


class OllamaCall(RequestModel):
    """A call in a message of the assistant."""

    function: OllamaFunction
    """The call."""


class OllamaMessage(RequestModel):
    """One message."""

    refused = {"images": ([],)}  # noqa: RUF012 (a class variable of the base)

    role: Literal["system", "user", "assistant", "tool"]
    """Who speaks."""
    content: str = ""
    """The text."""
    thinking: str | None = None
    """What the assistant thought before."""
    tool_calls: list[OllamaCall] | None = Field(None, max_length=MAX_TOOLS)
    """Calls that the assistant made."""
    tool_name: str | None = Field(None, max_length=256)
    """With the role `tool`: which one has answered."""


class OllamaChatRequest(OllamaFields):
    """A conversation to answer."""

    messages: Annotated[list[OllamaMessage], FailFast()] = Field(max_length=MAX_MESSAGES)
    """The conversation; empty: only a look whether the model is there."""
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    """Functions that the answer may call."""

    @property
    def chat(self) -> ChatRequest:
        """The same as a chat. Calls get ids, which this dialect has not; results answer them in their order."""
        messages: list[MessageIn] = []
        waiting: list[tuple[str, str]] = []
        for message in self.messages:
            calls: list[ToolCallIn] = []
            for call in message.tool_calls or ():
                text = orjson.dumps(call.function.arguments).decode()
                function = FunctionCallIn(name=call.function.name, arguments=text)
                calls.append(ToolCallIn(id=f"call_{len(messages)}_{len(calls)}", type="function", function=function))
                waiting.append((calls[-1].id, call.function.name))
            answered = None
            if message.role == "tool":
                fitting = [item for item in waiting if message.tool_name in (None, item[1])] or waiting
                if not fitting:
                    raise InvalidRequestError("no call comes before the result of a tool", param="messages")
                answered = fitting[0][0]
                waiting.remove(fitting[0])
            messages.append(
                MessageIn(
                    role=message.role,
                    content=message.content,
                    tool_calls=calls or None,
                    tool_call_id=answered,
                    reasoning_content=message.thinking,
                )
            )
        return ChatRequest(messages=messages, tools=self.tools, **self.shared, **self.thinking)


def _no_suffix(value: object) -> object:
    if value:
        raise InvalidRequestError(
            "`suffix` is not supported by this server", param="suffix", code="unsupported_parameter"
        )
    return None


class OllamaGenerateRequest(OllamaFields):
    """A text to answer, or to continue."""

    refused = {"images": ([],), "template": ("",), "context": ([],)}  # noqa: RUF012 (a class variable of the base)

    prompt: str = ""
    """The text; empty: only a look whether the model is there."""
    system: str | None = None
    """A system message before it."""
    raw: bool | None = None
    """Continue the text as it is, without the model's chat template."""
    suffix: Annotated[str | None, BeforeValidator(_no_suffix)] = None
    """Not supported."""

    def as_request(self, *, has_template: bool) -> ChatRequest | CompletionRequest:
        """The same as a chat, or as a completion."""
        if self.raw or not has_template:
            return CompletionRequest(prompt=[self.prompt], **self.shared)
        messages = [MessageIn(role="system", content=self.system)] if self.system else []
        messages.append(MessageIn(role="user", content=self.prompt))
        return ChatRequest(messages=messages, **self.shared, **self.thinking)


class ShowRequest(RequestModel):
    """Which model is asked about."""

    model: str | None = None
    """Its name."""
    name: str | None = None
    """The same under its older name."""


class OllamaLine(ResponseModel):
    """An answer, or the next piece of it."""

    model: str
    """Name of the model that answered."""
    created_at: str
    """When, RFC 3339."""
    message: dict[str, Any] | None = None
    """Of a chat: `role`, `content`, `thinking`, `tool_calls`."""
    response: str = ""
    """Of a text: what was generated."""
    thinking: str = ""
    """Of a text: what was thought before."""
    done: bool
    """Whether this is the end."""
    done_reason: Literal["stop", "length", "load"] = "stop"
    """Why it ended."""
    total_duration: int = 0
    """Nanoseconds from the request to the end."""
    load_duration: int = 0
    """Always 0: the model is there."""
    prompt_eval_count: int = 0
    """Tokens of the prompt."""
    prompt_eval_duration: int = 0
    """Nanoseconds to the first token."""
    eval_count: int = 0
    """Tokens generated."""
    eval_duration: int = 0
    """Nanoseconds from the first token to the end."""
