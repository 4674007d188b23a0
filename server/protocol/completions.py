"""`POST /v1/completions`."""

from typing import Literal, Self, cast

from pydantic import Field, model_validator

from server.errors import InvalidRequestError
from server.protocol.logprobs import MAX_TOP_LOGPROBS, CompletionLogprobs, PromptLogprobs
from server.protocol.prompts import Prompt, Prompts
from server.protocol.sampling import FinishReasonText, GenerationFields
from server.protocol.tools import ToolUse
from server.protocol.unsupported import COMPLETION_FIELDS
from server.protocol.usage import Usage
from server.protocol.wire import ResponseModel, StateError
from server.states.store import TurnEnd

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(GenerationFields):
    """Text or tokens to continue."""

    refused = COMPLETION_FIELDS

    prompt: Prompts | None = None
    """A text, token ids, a list of texts, or a list of lists of token ids. May be absent only with `state_id`, to
    continue where the state's answer was cut off."""
    echo: bool | None = None
    """Begin the text, and the log-probabilities, with the prompt."""
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """Return the log-probability of each token, and of that many most likely tokens in its place."""
    add_special_tokens: bool | None = None
    """Put the tokenizer's special tokens (such as a beginning-of-sequence token) around texts (default true, and false
    with `state_id`)."""

    @model_validator(mode="after")
    def _prompt_or_state(self) -> Self:
        if self.prompt is None and self.state_id is None:
            raise InvalidRequestError("`prompt` is missing", param="prompt")
        return self

    @property
    def num_prompts(self) -> int:
        """How many there are."""
        return len(self.prompts)

    @property
    def default_max_tokens(self) -> int | None:
        """Most tokens of an answer where the request says nothing."""
        return DEFAULT_MAX_TOKENS

    @property
    def tool_use(self) -> ToolUse | None:
        """Only chats have tools."""
        return None

    @property
    def turn(self) -> TurnEnd:
        """Where a state that is saved at the end of an answer ends."""
        return TurnEnd.TEXT

    @property
    def echoes(self) -> bool:
        """Whether the answer begins with the prompt."""
        return self.echo is True

    @property
    def num_top_logprobs(self) -> int | None:
        """How many of the most likely tokens are shown at each place; None: no log-probabilities are."""
        return self.logprobs

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, at least one; an empty one if the state alone is gone on from."""
        return [[]] if self.prompt is None else cast(list[Prompt], self.prompt)


class CompletionChoice(ResponseModel):
    """One answer, or the next piece of it in a stream."""

    index: int
    """Prompt number times `n`, plus the number of the answer."""
    text: str
    """Generated text; empty if the model has no tokenizer."""
    logprobs: CompletionLogprobs | None
    """With `logprobs`: those of the tokens; in a stream of the tokens since the last chunk."""
    finish_reason: FinishReasonText | None
    """`stop`: end of sequence, stop token or stop string; `length`: the token limit; null: more follows."""
    stop_reason: str | None = None
    """With the `finish_reason`: the stop string that ended it, if one did."""
    token_ids: tuple[int, ...] = ()
    """The generated tokens; with `return_token_ids`, or if the model has no tokenizer."""
    prompt_token_ids: tuple[int, ...] = ()
    """The prompt's tokens; with `return_token_ids`, in a stream only in the first piece."""
    prompt_logprobs: PromptLogprobs | None = None
    """With `prompt_logprobs`; in a stream the next ones, as the prompt is read."""
    state_id: str | None = ""
    """The state after this answer, with `return_state`; in a stream with the `finish_reason`. null: it was not kept."""
    state_error: StateError | None = None
    """Why the state was not kept, though the answer is whole."""


class Completion(ResponseModel):
    """The answer, whole or one chunk of a stream."""

    id: str
    """`cmpl-...`, the same for all chunks."""
    object: Literal["text_completion"]
    """Kind of this object."""
    created: int
    """Seconds since 1970."""
    model: str
    """Name of the model that answered."""
    system_fingerprint: str
    """Changes when model or server version change."""
    choices: list[CompletionChoice]
    """Answers; empty in the chunk that carries the usage."""
    usage: Usage | None = None
    """Token counts; in streams only with `stream_options.include_usage`."""
