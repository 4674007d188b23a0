"""`POST /tokenize`, `POST /detokenize`, `POST /apply-template`, `GET /tokenizer_info`."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from server.errors import InvalidRequestError
from server.protocol.chat import MAX_MESSAGES, ConversationFields, MessageIn
from server.protocol.prompts import check_token_ids
from server.protocol.tools import ToolFields
from server.protocol.wire import RequestModel, ResponseModel


class TokenizeRequest(ToolFields):
    """A text, or a conversation for the chat template."""

    model: str | None = None
    """Name of the model; the one that is served if absent."""
    prompt: str | None = None
    """The text; either this or `messages`."""
    messages: list[MessageIn] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    """The conversation; either this or `prompt`."""
    add_special_tokens: bool | None = None
    """Put the tokenizer's special tokens around it (default true for a text, false for a conversation)."""
    add_generation_prompt: bool | None = None
    """Open the assistant's turn after the last message (default true)."""
    return_token_strs: bool | None = None
    """Return the tokens as the vocabulary spells them too."""

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("give either `prompt` or `messages`", param="prompt")
        if self.prompt is not None and self.tools:
            raise InvalidRequestError("`tools` go with `messages`", param="tools")
        return self

    @property
    def conversation(self) -> ConversationFields | None:
        """The messages, and how they become a prompt; None: a text is given."""
        if self.messages is None:
            return None
        return ConversationFields(
            messages=self.messages,
            add_generation_prompt=self.add_generation_prompt,
            add_special_tokens=self.add_special_tokens,
        )


class TokenizeResponse(ResponseModel):
    """The tokens."""

    count: int
    """How many."""
    max_model_len: int | None
    """Most prompt tokens that the operator allows; null: as many as you like."""
    tokens: list[int]
    """Their ids."""
    token_strs: list[str] | None
    """Their spelling, with `return_token_strs`."""


def _token_list(value: object) -> object:
    return check_token_ids(value) if isinstance(value, list) else value


class ApplyTemplateRequest(ConversationFields, ToolFields):
    """A conversation to write as the model reads it."""

    model: str | None = None
    """Name of the model; the one that is served if absent."""


class ApplyTemplateResponse(ResponseModel):
    """The rendered conversation."""

    prompt: str
    """The text, special tokens spelled out. A special token that a message itself spells is not distinguished here; it
    is when a conversation is answered."""


class DetokenizeRequest(RequestModel):
    """Tokens to turn into text."""

    model: str | None = None
    """Name of the model; the one that is served if absent."""
    tokens: Annotated[
        list[Any], BeforeValidator(_token_list), WithJsonSchema({"type": "array", "items": {"type": "integer"}})
    ]
    """Token ids; an empty list is an empty text."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out (default false)."""
    return_token_texts: bool | None = None
    """Return the text of each token by itself too."""


class DetokenizeResponse(ResponseModel):
    """The text."""

    prompt: str
    """What the tokens spell; bytes that are no character are written as U+FFFD."""
    token_texts: list[str] | None = None
    """The text of each token by itself, with `return_token_texts`; bytes that are no whole character are U+FFFD."""


class TokenizerInfo(ResponseModel):
    """What clients that build prompts themselves need to know."""

    tokenizer_class: str | None
    """Name in the model's tokenizer configuration."""
    vocab_size: int
    """Number of token ids of the tokenizer."""
    bos_token: str | None
    """Beginning of a sequence."""
    eos_token: str | None
    """End of a sequence."""
    pad_token: str | None
    """Padding."""
    unk_token: str | None
    """Unknown text."""
    chat_template: str | None
    """Jinja source of the chat template."""
