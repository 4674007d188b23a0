"""How likely a model finds texts: streamed, so that a text of any length takes the same memory on both sides."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from clients.client import Client
from clients.errors import APIResponseError
from clients.types import CompletionChoice, GenerationOptions, Prompt

SCORE_OPTIONS: GenerationOptions = {"echo": True, "logprobs": 0, "max_tokens": 0}


@dataclass(frozen=True, slots=True)
class Score:
    """The likelihood of a text under a model.

    Attributes:
        num_tokens: of the text.
        num_scored: those with a log-probability: all but the first.
        num_bytes: of the text's scored part, in UTF-8; 0 if it was given as tokens.
        log_probability: sum over the scored tokens, natural logarithm.
    """

    num_tokens: int
    num_scored: int
    num_bytes: int
    log_probability: float

    @property
    def perplexity(self) -> float:
        """Of the scored tokens; NaN if there are none, infinite if it is too large for a number."""
        if self.num_scored == 0:
            return math.nan
        try:
            return math.exp(-self.log_probability / self.num_scored)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between models of different tokenizers; NaN without text."""
        return math.nan if self.num_bytes == 0 else -self.log_probability / math.log(2) / self.num_bytes


def token_logprobs(client: Client, prompt: Prompt, *, model: str | None = None) -> Iterator[tuple[str, float | None]]:
    """Text and log-probability of each token of one prompt, in order, as the server works through it.

    Raises:
        clients.errors.ClientError: the request failed, or the server gives no log-probabilities.
    """
    with client.stream_complete(prompt, model=model, **SCORE_OPTIONS) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                yield from _entries(choice)


def score(client: Client, text: str, *, model: str | None = None) -> Score:
    """The likelihood of a text.

    Raises:
        clients.errors.ClientError: the request failed, or the server gives no log-probabilities.
    """
    return summary(token_logprobs(client, text, model=model), text=text)


def summary(entries: Iterable[tuple[str, float | None]], *, text: str = "") -> Score:
    """Adds up what `token_logprobs` gives.

    Raises:
        APIResponseError: there is nothing to add up.
    """
    num_tokens = num_scored = 0
    first, values = "", []
    for token, value in entries:
        first = token if num_tokens == 0 else first
        num_tokens += 1
        if value is not None:
            num_scored += 1
            values.append(value)
            if len(values) > 1024:
                values = [math.fsum(values)]
    if num_tokens == 0:
        raise APIResponseError("the server gives no log-probabilities of prompts")
    num_bytes = max(0, len(text.encode()) - (len(first.encode()) if text.startswith(first) else 0))
    return Score(num_tokens, num_scored, num_bytes, math.fsum(values))


def _entries(choice: CompletionChoice) -> Iterator[tuple[str, float | None]]:
    logprobs: Any = choice.logprobs
    if logprobs is None:
        return
    try:
        yield from zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
    except (KeyError, TypeError, ValueError) as error:
        raise APIResponseError("the log-probabilities are not OpenAI-style") from error
