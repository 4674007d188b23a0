"""Log-probabilities on the wire. They are natural logarithms of the model's own distribution, before any sampling
parameter shapes it; what is not a finite number is written as -9999.0.
"""

from server.protocol.wire import ResponseModel

MAX_TOP_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 128


class CompletionLogprobs(ResponseModel):
    """Of a completion: parallel lists, an item for each token."""

    tokens: list[str]
    """Text of each token; bytes that are no character by themselves are written as U+FFFD."""
    token_logprobs: list[float | None]
    """Of each token; null for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None]
    """The token itself at each place, and the most likely ones or those of `logprob_token_ids`; of tokens of equal text
    the most likely one."""
    text_offset: list[int]
    """Where in the text each token begins, in characters; in a stream from the beginning of the first chunk."""


class ChatTopLogprob(ResponseModel):
    """A token that could have been there."""

    token: str
    """Its text."""
    logprob: float
    """Its log-probability."""
    bytes: list[int]
    """Its UTF-8 bytes; a character may need those of several tokens."""


class ChatTokenLogprob(ChatTopLogprob):
    """A token of the answer."""

    top_logprobs: list[ChatTopLogprob]
    """The most likely tokens at its place, `top_logprobs` of them. With `logprob_token_ids`: itself, then those."""


class ChatLogprobs(ResponseModel):
    """Of a chat answer."""

    content: list[ChatTokenLogprob]
    """Its tokens, the one that ended the turn included."""
    refusal: None
    """Always null here."""


class PromptLogprob(ResponseModel):
    """A token that is, or could have been, in the prompt."""

    logprob: float
    """Its log-probability."""
    rank: int
    """Its place among all tokens, from 1."""
    decoded_token: str
    """Its text."""


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of the prompt: by token id, the token itself and the most likely ones; null for the first token."""
