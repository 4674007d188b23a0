"""`GET /v1/models`."""

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
    max_model_len: int | None
    """Most prompt tokens that the operator allows; null: as many as you like."""


class ModelList(ResponseModel):
    """All models."""

    object: Literal["list"]
    """Kind of this object."""
    data: list[ModelCard]
    """The models."""
