"""What goes over the wire, as the client sees it.

Answers are read leniently: fields this client does not know are kept (as attributes), and fields that
other servers leave out have defaults, so that one client speaks to every OpenAI-style server.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

from pydantic import BaseModel, ConfigDict

Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""A text, several texts, token ids, or several lists of token ids."""


class Message(TypedDict):
    """One turn of a conversation that is sent."""

    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: NotRequired[str | None]
    """May be absent beside `tool_calls`."""
    name: NotRequired[str]
    tool_calls: NotRequired[Sequence[Mapping[str, Any]]]
    """Of the assistant: `{"id", "type": "function", "function": {"name", "arguments"}}` each."""
    tool_call_id: NotRequired[str]
    """Of a tool: which call this answers."""
    reasoning_content: NotRequired[str]
    """Of the assistant: what it thought before."""
    reasoning: NotRequired[str]
    """The same under its newer name."""
    refusal: NotRequired[str]
    """Of the assistant: what it said instead of an answer."""


class GenerationOptions(TypedDict, total=False):
    """How to generate; what is absent is left to the server. See the server's documentation for ranges."""

    max_tokens: int
    """Most new tokens of each choice."""
    max_completion_tokens: int
    """The chat endpoint's newer name of `max_tokens`; wins over it."""
    min_tokens: int
    """No end of text before that many new tokens."""
    temperature: float
    """0 is greedy."""
    top_p: float
    """Keep the fewest tokens with this probability mass."""
    top_k: int
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float
    """Keep tokens at least this fraction as likely as the most likely one."""
    repetition_penalty: float
    """Over prompt and output; 1 is off."""
    presence_penalty: float
    """Subtracted once from the logit of each token generated before."""
    frequency_penalty: float
    """Subtracted for each occurrence in the output."""
    logit_bias: Mapping[str, float]
    """Token id, as a string, to a bias added to its logit."""
    seed: int
    """Equal seeds give equal answers."""
    n: int
    """Number of choices."""
    stop: str | Sequence[str]
    """Texts at which an answer ends; they are not part of it."""
    stop_token_ids: Sequence[int]
    """Tokens at which an answer ends."""
    echo: bool
    """Completions only: begin the text with the prompt."""
    logprobs: int | bool
    """Return log-probabilities. Completions: with that many most likely tokens; chat: whether to."""
    top_logprobs: int
    """Chat only, with `logprobs`: how many of the most likely tokens."""
    prompt_logprobs: int
    """Return the log-probabilities of the prompt's tokens, with that many most likely ones."""
    logprob_token_ids: Sequence[int]
    """Return the log-probabilities of these tokens too."""
    return_token_ids: bool
    """Return the tokens as ids, too."""
    return_tokens_as_token_ids: bool
    """In log-probabilities write `token_id:7` for the text of token 7."""
    ignore_eos: bool
    """Go on through the model's end-of-text tokens."""
    stream_options: Mapping[str, bool]
    """Streams only; this client asks for `include_usage` unless told otherwise."""
    typical_p: float
    """Keep the tokens that surprise about as much as is to be expected, up to this probability mass."""
    allowed_token_ids: Sequence[int]
    """The only tokens that may come."""
    bad_words: Sequence[str]
    """Words that are not generated."""
    include_stop_str_in_output: bool
    """Keep the stop text."""
    skip_special_tokens: bool
    """Leave special tokens out of the text."""
    add_special_tokens: bool
    """Put the tokenizer's special tokens around the prompt."""
    truncate_prompt_tokens: int
    """Use only that many tokens of the prompt, the last ones."""
    truncation_side: Literal["left", "right"]
    """Which end is left out; `right`: the first tokens are used."""
    add_generation_prompt: bool
    """Chat only: open the assistant's turn after the last message."""
    continue_final_message: bool
    """Chat only: go on with the last message, which is the assistant's."""
    chat_template_kwargs: Mapping[str, str | int | float | bool | None]
    """Chat only: further variables of the model's template."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"]
    """Chat only: how much to think, if the model's template has a place for it."""
    enable_thinking: bool
    """Chat only: think before answering, or not; of models that can be told."""
    thinking: Mapping[str, str | int]
    """Chat only: the same, as `{"type": "enabled"}` or `{"type": "disabled"}`."""
    include_reasoning: bool
    """Chat only: tell what was thought before the answer."""
    response_format: Mapping[str, Any]
    """The form of the answer: `{"type": "json_object"}`, or `json_schema` with a schema."""
    structured_outputs: Mapping[str, Any]
    """The form of the answer by one of `json`, `regex`, `choice`, `grammar`."""
    tools: Sequence[Mapping[str, Any]]
    """Chat only: functions that the answer may call."""
    tool_choice: str | Mapping[str, Any]
    """Chat only: `auto`, `none`, `required`, or one function by its name."""
    parallel_tool_calls: bool
    """Chat only: whether an answer may have several calls."""
    prediction: Mapping[str, Any]
    """Chat only: `{"type": "content", "content": ...}`, the answer as it is expected: the same answer, sooner."""
    priority: int
    """Lower numbers are begun first when the server is full."""
    request_id: str
    """Name of the request, part of the answer's id."""
    timeout: float
    """Seconds after which the server ends the request with an error."""
    user: str
    """Your name for the end user."""
    state_id: str
    """A saved state to go on from; prompt or messages are what comes after it."""
    return_state: bool | Mapping[str, object]
    """Save the state at the end of each answer; an object says `name`, `ttl_s`, `update`."""
    cache_prompt: bool
    """Use and fill the server's prefix cache."""
    cache_salt: str
    """Share cached prefixes only with requests of the same salt."""


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class Usage(_Wire):
    """Tokens that a request cost."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class CompletionChoice(_Wire):
    """One continuation, or a piece of one in a stream."""

    index: int = 0
    text: str = ""
    finish_reason: str | None = None
    """`stop`, `length`, ...; None in a stream until the last piece."""
    logprobs: Any = None


class Completion(_Wire):
    """Answer of `/v1/completions`, and each chunk of its stream."""

    id: str = ""
    created: int = 0
    model: str = ""
    choices: tuple[CompletionChoice, ...]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """Text of choice 0; empty if this chunk has none."""
        return "".join(choice.text for choice in self.choices if choice.index == 0)

    @property
    def finish_reason(self) -> str | None:
        """Why choice 0 ended; None if this chunk does not say."""
        return _finish_reason(self.choices)


class ChatMessage(_Wire):
    """One turn of a conversation that was received, or a piece of one in a stream."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    """What was thought before the content."""
    reasoning: str | None = None
    """The same, as newer servers call it."""
    tool_calls: Any = None

    @property
    def thought(self) -> str:
        """What was thought before the content; empty if nothing was."""
        return (self.reasoning if self.reasoning_content is None else self.reasoning_content) or ""


class ChatChoice(_Wire):
    """One answer."""

    index: int = 0
    message: ChatMessage
    finish_reason: str | None = None
    logprobs: Any = None


class ChatCompletion(_Wire):
    """Answer of `/v1/chat/completions`."""

    id: str = ""
    created: int = 0
    model: str = ""
    choices: tuple[ChatChoice, ...]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """Text of choice 0; empty if it has none (a tool call, say)."""
        contents = (choice.message.content for choice in self.choices if choice.index == 0)
        return "".join(content for content in contents if content is not None)

    @property
    def finish_reason(self) -> str | None:
        """Why choice 0 ended."""
        return _finish_reason(self.choices)


class ChatChunkChoice(_Wire):
    """A piece of one answer."""

    index: int = 0
    delta: ChatMessage = ChatMessage()
    finish_reason: str | None = None
    logprobs: Any = None


class ChatChunk(_Wire):
    """Each chunk of a chat stream."""

    id: str = ""
    created: int = 0
    model: str = ""
    choices: tuple[ChatChunkChoice, ...]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """New text of choice 0; empty if this chunk has none."""
        contents = (choice.delta.content for choice in self.choices if choice.index == 0)
        return "".join(content for content in contents if content is not None)

    @property
    def thought(self) -> str:
        """What is new in the thought before the text of choice 0; empty if this chunk has none of it."""
        return "".join(choice.delta.thought for choice in self.choices if choice.index == 0)

    @property
    def finish_reason(self) -> str | None:
        """Why choice 0 ended; None if this chunk does not say."""
        return _finish_reason(self.choices)


class Model(_Wire):
    """A model that the server serves."""

    id: str
    created: int = 0
    owned_by: str = ""


class ModelList(_Wire):
    """Answer of `/v1/models`."""

    data: tuple[Model, ...]


class Tokenized(_Wire):
    """Answer of `/tokenize`."""

    tokens: tuple[int, ...]


class Detokenized(_Wire):
    """Answer of `/detokenize`."""

    prompt: str


class SelfCheckFinding(_Wire):
    """One way to compute the same tokens, compared with reading them at once; no values: the server cannot do it."""

    name: str
    num_values: int
    largest_difference: float


class SelfCheckReport(_Wire):
    """Answer of `/admin/selfcheck`."""

    passed: bool
    tolerance: float
    largest_difference: float
    findings: tuple[SelfCheckFinding, ...]


class Health(_Wire):
    """Answer of `/health`; what else the server tells about itself is kept as attributes."""

    status: str = "ok"


def _finish_reason(choices: Sequence[CompletionChoice | ChatChoice | ChatChunkChoice]) -> str | None:
    return next((choice.finish_reason for choice in choices if choice.index == 0), None)
