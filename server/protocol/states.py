"""`/v1/states`, and the fields by which completions and chat begin from states and leave them behind."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema, model_validator

from server.errors import InvalidRequestError
from server.protocol.wire import RequestModel, ResponseModel
from server.states.store import PointRecord, StateRecord

MAX_TTL_S = 10 * 365 * 86400.0
Name = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=re.compile(r"^[^\x00-\x1f\x7f]+$"))]
StateId = Annotated[str, StringConstraints(min_length=1, max_length=100)]
TimeToLive = Annotated[float, Field(gt=0, le=MAX_TTL_S)]


class ReturnState(RequestModel):
    """How to keep the state at the end of an answer."""

    name: Name | None = None
    """A name for it, unique among your states."""
    ttl_s: TimeToLive | None = None
    """Seconds without use after which it is deleted; the server's default if absent."""
    update: bool | None = None
    """Advance the state that `state_id` names instead of making a new one (default false)."""


def _return_state(value: object) -> object:
    """`true` is `{}`, `false` is null."""
    if isinstance(value, bool):
        return {} if value else None
    return value


class StateFields(RequestModel):
    """Where a conversation comes from and what is kept of it; a part of every generating request."""

    state_id: StateId | None = None
    """A saved state to continue from: the prompt, or the messages, are what comes after it."""
    return_state: Annotated[
        ReturnState | None,
        BeforeValidator(_return_state),
        WithJsonSchema(
            {"anyOf": [{"type": "boolean"}, {"$ref": "#/components/schemas/ReturnState"}, {"type": "null"}]}
        ),
    ] = None
    """Save the state at the end of each answer and return its `state_id`: true, or an object with details."""
    cache_prompt: bool | None = None
    """Use and fill the prefix cache (default true)."""
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    """Cached prefixes are shared only among requests of the same key with the same salt."""

    @model_validator(mode="after")
    def _state_fields(self) -> Self:
        if self.return_state is not None and self.return_state.update and self.state_id is None:
            raise InvalidRequestError("`return_state.update` needs the `state_id` to update", param="return_state")
        if self.return_state is not None and self.return_state.update and self.return_state.name is not None:
            raise InvalidRequestError("`return_state`: a state that is updated keeps its name", param="return_state")
        if self.cache_salt is not None and self.cache_prompt is False:
            raise InvalidRequestError("`cache_salt` has no effect with `cache_prompt: false`", param="cache_salt")
        return self


class ForkRequest(RequestModel):
    """A second state that begins where this one is, or where a point of it is."""

    name: Name | None = None
    """A name for the new state, unique among your states."""
    point: Name | None = None
    """Begin at this point instead of the end."""
    ttl_s: TimeToLive | None = None
    """Seconds without use after which it is deleted; the server's default if absent."""


class PointRequest(RequestModel):
    """A name for the position where the state is now."""

    name: Name
    """The point's name; if the state has one of that name, it moves here."""


class RewindRequest(RequestModel):
    """Back to a named position."""

    point: Name
    """The point's name."""


class StatePoint(ResponseModel):
    """A position to which a state can be rewound."""

    name: str
    """Its name."""
    created_at: int
    """Seconds since 1970."""
    num_tokens: int
    """Length of the conversation there."""

    @classmethod
    def of(cls, point: PointRecord) -> "StatePoint":
        """The record on the wire."""
        return cls(name=point.name, created_at=int(point.created), num_tokens=point.snapshot.num_tokens)


class State(ResponseModel):
    """A saved conversation."""

    id: str
    """`state_...`; whoever has it and your key can resume it."""
    object: Literal["state"]
    """Kind of this object."""
    created_at: int
    """Seconds since 1970."""
    last_used_at: int
    """Seconds since 1970."""
    expires_at: int | None
    """Seconds since 1970; every use puts it off. null: never."""
    name: str | None
    """Its name, if it has one."""
    parent_id: str | None
    """The state that it was made from, which may be gone."""
    model: str
    """Name of the model."""
    held_by: str | None
    """Name of the server that wrote it last, as in `X-Dijiang-Replica`: there, resuming it needs no copy over the
    network. null: there is one server alone, or it is not known."""
    model_fingerprint: str
    """What the model computes; only a model with the same fingerprint can resume this state."""
    num_tokens: int
    """Length of the conversation."""
    num_pending_tokens: int
    """How many of them are fed when it is resumed: the last sampled token of an answer, or none."""
    bytes: int
    """Size of the state, whatever the conversation's length."""
    points: list[StatePoint]
    """Named positions to rewind to."""

    @classmethod
    def of(cls, record: StateRecord, *, model: str) -> "State":
        """The record on the wire."""
        return cls(
            id=record.id,
            object="state",
            created_at=int(record.created),
            last_used_at=int(record.used),
            expires_at=None if record.expires is None else int(record.expires),
            name=record.name,
            parent_id=record.parent,
            held_by=record.head.held_by or None,
            model=model,
            model_fingerprint=record.head.fingerprint,
            num_tokens=record.head.num_tokens,
            num_pending_tokens=len(record.head.pending),
            bytes=record.head.num_bytes,
            points=[StatePoint.of(point) for point in record.points],
        )


class StateList(ResponseModel):
    """A page of states, newest first."""

    object: Literal["list"]
    """Kind of this object."""
    data: list[State]
    """The states."""
    first_id: str | None
    """Id of the first one."""
    last_id: str | None
    """Id of the last one."""
    next_cursor: str | None
    """For `after`, where the next page begins, though states of this one are deleted meanwhile; null: there is none."""
    has_more: bool
    """Whether there are more after it."""


class StateDeleted(ResponseModel):
    """The state is gone."""

    id: str
    """Its id."""
    object: Literal["state"]
    """Kind of what was deleted."""
    deleted: Literal[True]
    """Always true."""


def page_of(records: list[StateRecord], *, limit: int, model: str) -> StateList:
    """The first `limit` of the records, which are one more if there are more."""
    data = [State.of(record, model=model) for record in records[:limit]]
    fields: dict[str, Any] = {"first_id": data[0].id if data else None, "last_id": data[-1].id if data else None}
    has_more = len(records) > limit
    fields["next_cursor"] = records[limit - 1].cursor if has_more else None
    return StateList(object="list", data=data, has_more=has_more, **fields)
