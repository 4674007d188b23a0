"""`GET /v1/models`, `GET /v1/capacity`."""

from typing import Literal

from server.protocol.wire import ResponseModel


class ModelCard(ResponseModel):
    """One model that can be asked."""

    id: str
    """Name for the `model` field of requests."""
    object: Literal["model"]
    """Kind of this object."""
    created: int
    """When the server started to serve it, seconds since 1970."""
    owned_by: str
    """Always `dijiang`."""
    max_model_len: int
    """For clients that want a number: the operator's limit of prompt tokens, or else one to plan with
    (`--context-length`). A conversation may be longer: nothing grows with its length."""
    context_length: int
    """The same, as other clients call it."""
    max_prompt_tokens: int | None
    """Most prompt tokens that the operator allows; null: as many as you like."""
    default_sampling: dict[str, float]
    """Sampling of requests that do not say otherwise, by the names of their fields."""


class ModelList(ResponseModel):
    """All models."""

    object: Literal["list"]
    """Kind of this object."""
    data: list[ModelCard]
    """The models."""


class Capacity(ResponseModel):
    """Room for conversations. Each takes the same memory, however long it is."""

    slots: int
    """Conversations that can run at once."""
    free: int
    """How many of them are not taken."""
    running: int
    """Requests that run."""
    waiting: int
    """Requests that wait for a slot."""
    state_bytes: int
    """Memory of one conversation's state."""
    total_state_bytes: int
    """Memory of all of them."""
    kv_cache_bytes_per_token: int
    """For comparison: what ordinary attention of this shape would keep of each token, in 16-bit numbers."""
    max_prompt_tokens: int | None
    """Most prompt tokens that the operator allows; null: as many as you like."""
