"""`POST /v1/states`: a state made by feeding a prompt."""

from typing import Self, cast

from pydantic import Field, model_validator

from server.errors import InvalidRequestError
from server.protocol.chat import MAX_MESSAGES, MessageIn
from server.protocol.prompts import Prompt, Prompts
from server.protocol.states import Name, State, StateFields, TimeToLive
from server.protocol.usage import Usage
from server.states.store import Turn


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
    def prompts(self) -> list[Prompt]:
        """The one prompt, in a list."""
        return cast(list[Prompt], self.prompt)

    @property
    def turn(self) -> Turn:
        """Where the state will end."""
        if self.messages is None:
            return Turn.TEXT
        return Turn.OPEN if self.add_generation_prompt else Turn.CLOSED


class CreatedState(State):
    """The new state, and what it cost."""

    usage: Usage
    """Token counts; nothing is generated."""
