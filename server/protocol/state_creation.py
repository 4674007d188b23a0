"""`POST /v1/states`: a state made by feeding a prompt."""

from typing import Any, Self

from pydantic import Field, model_validator

from server.errors import InvalidRequestError
from server.protocol.chat import MAX_MESSAGES, ChatRequest, MessageIn
from server.protocol.completions import CompletionRequest
from server.protocol.prompts import Prompts
from server.protocol.states import Name, ReturnState, State, StateFields, TimeToLive
from server.protocol.usage import Usage


class CreateStateRequest(StateFields):
    """A text, or a conversation, to remember."""

    model: str | None = None
    """Name of the model; the one that is served if absent."""
    prompt: Prompts | None = None
    """A text or token ids (one prompt); either this or `messages`."""
    messages: list[MessageIn] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    """A conversation; either this or `prompt`."""
    add_generation_prompt: bool | None = None
    """Open the assistant's turn after the last message (default false)."""
    add_special_tokens: bool | None = None
    """Put the tokenizer's special tokens around a text (default true, and false with `state_id`)."""
    name: Name | None = None
    """A name for the state, unique among your states."""
    ttl_s: TimeToLive | None = None
    """Seconds without use after which it is deleted; the server's default if absent."""

    timeout: float | None = Field(None, gt=0, le=86400)
    """Seconds after which the request ends with an error."""

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("give either `prompt` or `messages`", param="prompt")
        if self.prompt is not None and len(self.prompt) > 1:
            raise InvalidRequestError(f"a state has one prompt, not {len(self.prompt)}", param="prompt")
        if self.return_state is not None:
            raise InvalidRequestError("`return_state` is what this route does; leave it out", param="return_state")
        return self

    @property
    def generation(self) -> ChatRequest | CompletionRequest:
        """The same as a request that generates nothing and returns its state."""
        shared: dict[str, Any] = {
            **{name: getattr(self, name) for name in ("model", "state_id", "cache_prompt", "cache_salt", "timeout")},
            "add_special_tokens": self.add_special_tokens,
            "return_state": ReturnState(name=self.name, ttl_s=self.ttl_s),
            "max_tokens": 0,
        }
        if self.messages is None:
            return CompletionRequest(prompt=self.prompt, **shared)
        opens = self.add_generation_prompt is True
        return ChatRequest(messages=self.messages, add_generation_prompt=opens, **shared)


class CreatedState(State):
    """The new state, and what it cost."""

    usage: Usage
    """Token counts; nothing is generated."""
