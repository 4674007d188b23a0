"""`POST /v1/chat/completions`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    FailFast,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from server.errors import InvalidRequestError
from server.protocol.logprobs import MAX_TOP_LOGPROBS, ChatLogprobs, PromptLogprobs
from server.protocol.prompts import Prediction
from server.protocol.sampling import FinishReasonText, GenerationFields
from server.protocol.tools import MAX_TOOLS, ToolCallIn, ToolCallOut, ToolFields
from server.protocol.unsupported import CHAT_FIELDS
from server.protocol.usage import Usage
from server.protocol.wire import RequestModel, ResponseModel, StateError
from server.states.store import TurnEnd

MAX_MESSAGES = 10_000
MAX_TEMPLATE_VARIABLES = 16
RESERVED_VARIABLES = frozenset(
    (
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"),
        *("bos_token", "eos_token", "pad_token", "unk_token", "raise_exception", "strftime_now"),
        *("range", "dict", "lipsum", "cycler", "joiner", "namespace"),
    )
)
MESSAGE_FIELDS: Mapping[str, tuple[Any, ...]] = {"function_call": (), "audio": ()}


def _joined_parts(value: object) -> object:
    """Text parts `[{"type": "text", "text": "..."}]` as one text; null, beside calls of tools, as an empty one."""
    if value is None:
        return value
    if not isinstance(value, list):
        if not isinstance(value, str):
            raise PydanticCustomError("content", "must be a string or a list of text parts")
        return value
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal"):
            raise PydanticCustomError(
                "content", "only parts of type 'text' are supported (images, audio and files are not)"
            )
        text = part.get(kind)
        if not isinstance(text, str):
            raise PydanticCustomError("content", "a part of type '{kind}' needs `{kind}`, a string", {"kind": kind})
        texts.append(text)
    return "".join(texts)


def _needed(value: str | None, info: ValidationInfo) -> str | None:
    # What is wrong with the calls is said already.
    is_alone = "tool_calls" in info.data and not info.data["tool_calls"] and info.data.get("refusal") is None
    if value is None and is_alone:
        raise PydanticCustomError("content", "must be a string or a list of text parts")
    return value


class MessageIn(RequestModel):
    """One message of the conversation."""

    refused = MESSAGE_FIELDS

    role: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """Who speaks: `system`, `developer`, `user`, `assistant`, `tool` (the answer of a tool that was called), or
    whatever else the model's template knows."""
    tool_calls: list[ToolCallIn] | None = Field(None, max_length=MAX_TOOLS)
    """Calls that the assistant made; only in its messages."""
    refusal: str | None = None
    """What the assistant said instead of an answer; its text where there is no `content`."""
    content: Annotated[
        str | None,
        BeforeValidator(_joined_parts),
        AfterValidator(_needed),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                            "required": ["type", "text"],
                        },
                    },
                    {"type": "null"},
                ]
            }
        ),
    ] = Field(None, validate_default=True)
    """The text, or a list of text parts, which are put together; may be absent beside `tool_calls` and `refusal`."""
    name: str | None = Field(None, max_length=256)
    """Name of the speaker, if the model's template has a place for it."""
    tool_call_id: str | None = Field(None, max_length=256)
    """Which call this answers; only with the role `tool`."""
    reasoning_content: str | None = None
    """What the assistant thought before it answered, if the model's template has a place for it."""
    reasoning: str | None = None
    """The same under its newer name; `reasoning_content` wins."""

    @field_validator("role", mode="before")
    @classmethod
    def _known_role(cls, role: Any) -> Any:
        if role == "function":
            raise InvalidRequestError(
                "functions in their old form are not supported by this server: use tools and the role `tool`",
                param="messages",
                code="unsupported_parameter",
            )
        return role

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "only the assistant calls tools")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise PydanticCustomError("tool_call_id", "the role tool and `tool_call_id` need each other")
        return self

    @property
    def text(self) -> str:
        """The content; empty if there is none."""
        return self.refusal or "" if self.content is None else self.content

    @property
    def thought(self) -> str | None:
        """What was thought before; None: nothing is known of it."""
        return self.reasoning if self.reasoning_content is None else self.reasoning_content


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
ChatFinishReason = FinishReasonText | Literal["tool_calls"]


def _template_variables(values: dict[str, Any] | None) -> dict[str, Any] | None:
    """Refuses what is no plain value, and names that mean something else."""
    if values is None:
        return None
    if len(values) > MAX_TEMPLATE_VARIABLES:
        raise PydanticCustomError("chat_template_kwargs", "has more than 16 variables")
    for name, value in values.items():
        if not name.isidentifier() or len(name) > 64 or name.startswith("_") or name in RESERVED_VARIABLES:
            raise PydanticCustomError("chat_template_kwargs", "has a name that is not for requests to set")
        if not isinstance(value, str | int | float | None) or (isinstance(value, str) and len(value) > 1024):
            raise PydanticCustomError("chat_template_kwargs", "values must be numbers, booleans, null or short texts")
    return values


class ThinkingOption(RequestModel):
    """Whether to think before answering."""

    type: Literal["enabled", "disabled", "adaptive"]
    """`adaptive`: as the model does by itself."""
    budget_tokens: int | None = Field(None, ge=0)
    """Without effect."""


class ConversationFields(RequestModel):
    """Messages, and how they become a prompt."""

    messages: Annotated[list[MessageIn], FailFast()] = Field(max_length=MAX_MESSAGES)
    """The conversation so far; with `state_id`: what is new, and nothing to continue an answer that was cut off."""
    add_generation_prompt: bool | None = None
    """Open the assistant's turn after the last message (default true)."""
    continue_final_message: bool | None = None
    """Go on with the last message, which must be the assistant's, instead of a new turn."""
    add_special_tokens: bool | None = None
    """Put the tokenizer's special tokens around what the template wrote (default false)."""
    chat_template_kwargs: Annotated[dict[str, Any] | None, AfterValidator(_template_variables)] = None
    """Further variables of the model's chat template, such as `enable_thinking`: texts, numbers, booleans, null."""
    reasoning_effort: ReasoningEffort | None = None
    """How much to think before answering: `none`, or what the model's chat template understands; without effect where
    it has no use for it."""
    enable_thinking: bool | None = None
    """Think before answering; of models whose chat template can turn it on and off."""
    thinking: ThinkingOption | None = None
    """The same as `{"type": "enabled"}` or `{"type": "disabled"}`."""

    @property
    def thinks(self) -> bool | None:
        """Whether to think before answering; None: as the model does by itself."""
        if self.enable_thinking is not None or self.thinking is None or self.thinking.type == "adaptive":
            return self.enable_thinking
        return self.thinking.type == "enabled"

    @model_validator(mode="after")
    def _turns(self) -> Self:
        if not self.messages and (getattr(self, "state_id", None) is None or self.continue_final_message):
            raise InvalidRequestError("at least one message is needed", param="messages", code="invalid_value")
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise InvalidRequestError(
                    "`continue_final_message` and `add_generation_prompt` exclude each other",
                    param="continue_final_message",
                )
            if self.messages[-1].role != "assistant":
                raise InvalidRequestError(
                    "`continue_final_message` needs a last message of the assistant", param="continue_final_message"
                )
        return self


class ChatRequest(GenerationFields, ConversationFields, ToolFields):
    """A conversation to answer."""

    refused = CHAT_FIELDS

    logprobs: bool | None = None
    """Return the log-probability of each token of the answer."""
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """With `logprobs`: return that many of the most likely tokens at each place too."""

    include_reasoning: bool | None = None
    """Tell what was thought before the answer, of models that think (default true)."""
    prediction: Prediction | None = None
    """What the answer is expected to be, in large part: makes it faster where the server speculates, and changes
    nothing else. With any other field, `n` and `stream` included."""

    @model_validator(mode="after")
    def _logprobs_wanted(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
        return self

    @property
    def prompt_field(self) -> str:
        """Where the prompt comes from."""
        return "messages"

    @property
    def default_max_tokens(self) -> int | None:
        """Most tokens of an answer where the request says nothing; None: no limit."""
        return None

    @property
    def turn(self) -> TurnEnd:
        """Where a state that is saved at the end of an answer ends."""
        reads_only = self.token_limit == 0 and not self.continue_final_message
        return TurnEnd.CLOSED if reads_only and self.add_generation_prompt is False else TurnEnd.OPEN

    @property
    def num_top_logprobs(self) -> int | None:
        """How many of the most likely tokens are shown at each place; None: no log-probabilities are."""
        return (self.top_logprobs or 0) if self.logprobs else None


class ChatMessageOut(ResponseModel):
    """The assistant's answer."""

    role: Literal["assistant"]
    """Who speaks."""
    content: str | None
    """The text; null if there are only calls of tools."""
    refusal: None
    """Always null here."""
    annotations: tuple[()]
    """Always empty here."""
    reasoning_content: str = ""
    """What was thought before the answer, if anything was."""
    reasoning: str = ""
    """The same, under its newer name."""
    tool_calls: tuple[ToolCallOut, ...] = ()
    """Calls of tools, if there are any."""


class ChatChoice(ResponseModel):
    """One answer."""

    index: int
    """Number of the answer, from 0."""
    message: ChatMessageOut
    """The answer itself."""
    logprobs: ChatLogprobs | None
    """With `logprobs`: those of the tokens; in a stream of the tokens since the last chunk."""
    finish_reason: ChatFinishReason
    """`stop`: end of turn, stop token or stop string; `tool_calls`: likewise, after calls; `length`: the limit."""
    stop_reason: str | None
    """The stop string that ended it, if one did."""
    token_ids: tuple[int, ...] = ()
    """The generated tokens, with `return_token_ids`."""
    state_id: str | None = ""
    """The state after this answer, with `return_state`; in a stream with the `finish_reason`. null: it was not kept."""
    state_error: StateError | None = None
    """Why the state was not kept, though the answer is whole."""


class ChatCompletion(ResponseModel):
    """The whole answer."""

    id: str
    """`chatcmpl-...`."""
    object: Literal["chat.completion"]
    """Kind of this object."""
    created: int
    """Seconds since 1970."""
    model: str
    """Name of the model that answered."""
    system_fingerprint: str
    """Changes when model or server version change."""
    choices: list[ChatChoice]
    """Answers, `n` of them."""
    usage: Usage
    """Token counts."""
    prompt_token_ids: tuple[int, ...] = ()
    """The tokens of the rendered conversation, with `return_token_ids`."""
    prompt_logprobs: PromptLogprobs | None = None
    """With `prompt_logprobs`: of the rendered conversation."""


class ChatDelta(ResponseModel):
    """What is new in a chunk."""

    role: Literal["assistant"] = "assistant"
    """Only in the first chunk of a choice."""
    content: str = ""
    """The next piece of text."""
    reasoning_content: str = ""
    """The next piece of what is thought before the text."""
    reasoning: str = ""
    """The same, under its newer name."""
    tool_calls: tuple[ToolCallOut, ...] = ()
    """The beginning of a call, or the next piece of its arguments."""


class ChatChunkChoice(ResponseModel):
    """The next piece of one answer."""

    index: int
    """Number of the answer, from 0."""
    delta: ChatDelta
    """What is new."""
    logprobs: ChatLogprobs | None
    """With `logprobs`: those of the tokens; in a stream of the tokens since the last chunk."""
    finish_reason: ChatFinishReason | None
    """Set in the last chunk of each answer."""
    stop_reason: str | None = None
    """In the last chunk: the stop string that ended the answer, if one did."""
    token_ids: tuple[int, ...] = ()
    """The tokens since the last chunk, with `return_token_ids`."""
    state_id: str | None = ""
    """The state after this answer, with `return_state`; in a stream with the `finish_reason`. null: it was not kept."""
    state_error: StateError | None = None
    """Why the state was not kept, though the answer is whole."""


class ChatChunk(ResponseModel):
    """One event of a stream."""

    id: str
    """`chatcmpl-...`, the same for all chunks."""
    object: Literal["chat.completion.chunk"]
    """Kind of this object."""
    created: int
    """Seconds since 1970, the same for all chunks."""
    model: str
    """Name of the model that answers."""
    system_fingerprint: str
    """Changes when model or server version change."""
    choices: list[ChatChunkChoice]
    """One piece; empty in the chunk that carries the usage."""
    usage: Usage | None = None
    """Token counts, only with `stream_options.include_usage`."""
    prompt_token_ids: tuple[int, ...] = ()
    """The tokens of the rendered conversation, in the first chunk, with `return_token_ids`."""
    prompt_logprobs: PromptLogprobs | None = None
    """With `prompt_logprobs`: the next ones, as the conversation is read."""
