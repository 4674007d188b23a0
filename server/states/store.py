"""What a store of states promises, and what it holds.

A *snapshot* is one immutable file, a conversation at one position. A *state* is a handle with an id and an owner whose
head is a snapshot; advancing it gives it another head, a named *point* remembers one, a fork is another handle
with the same head. A stored *response* of the Responses API has a snapshot of its own. A snapshot lives as long as
anything refers to it or is just using it.

The embedded store (`server.states.embedded`) is the default. One that replicas share keeps to the same protocol: `hold`
is the place where it would bring a snapshot's file to this machine.
"""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from server.errors import ApiError, InvalidRequestError, NotFoundError


class Turn(StrEnum):
    """Where in a conversation a snapshot ends, for those who add messages to it."""

    OPEN = "open"
    """Inside an assistant's message, or at its end-of-turn token."""
    CLOSED = "closed"
    """After whole messages."""
    TEXT = "text"
    """In plain text that is no conversation."""


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """One conversation at one position.

    Attributes:
        file: name in the store's folder.
        position: tokens that were fed.
        pending: tokens that come first when it goes on.
        last_token: the last token, fed or pending.
        turn: where it ends.
        num_bytes: size of the file.
        fingerprint: of the model.
    """

    file: str
    position: int
    pending: tuple[int, ...]
    last_token: int
    turn: Turn
    num_bytes: int
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """Of the conversation."""
        return self.position + len(self.pending)


@dataclass(frozen=True, slots=True)
class PointRecord:
    """A named position of a state to which it can be rewound."""

    name: str
    created: float
    snapshot: SnapshotRecord


@dataclass(frozen=True, slots=True)
class StateRecord:
    """One state.

    Attributes:
        id: `state_` and 32 hexadecimal digits, not to be guessed.
        owner: whose it is; nobody else can tell that it exists.
        name: unique among the owner's states; None: it has none.
        parent: the state that it was made from; it may be gone.
        created / used: seconds since 1970.
        ttl_s: how long it lives without being used; None: for ever.
        head: where it is now.
        points: by name.
    """

    id: str
    owner: str
    name: str | None
    parent: str | None
    created: float
    used: float
    ttl_s: float | None
    head: SnapshotRecord
    points: tuple[PointRecord, ...] = ()

    @property
    def expires(self) -> float | None:
        return None if self.ttl_s is None else self.used + self.ttl_s


@dataclass(frozen=True, slots=True)
class NewState:
    """What a state is made of; see `StateRecord`."""

    owner: str
    head: SnapshotRecord
    name: str | None = None
    parent: str | None = None
    ttl_s: float | None = None


@dataclass(frozen=True, slots=True)
class ResponseRecord:
    """A stored response of the Responses API.

    Attributes:
        body: the object as it is on the wire.
        input_items: what it answered.
        snapshot: its conversation at its end; None if there is nothing to go on from.
    """

    id: str
    owner: str
    created: float
    ttl_s: float | None
    body: Mapping[str, Any]
    input_items: tuple[Mapping[str, Any], ...]
    snapshot: SnapshotRecord | None


@dataclass(frozen=True, slots=True)
class StoreTotals:
    """What a store holds: states of all owners, bytes of all snapshots, and how many it may."""

    num_states: int
    num_bytes: int
    max_bytes: int


class Room(Protocol):
    """Space that is kept free for snapshots that are being written."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names to write them under."""
        ...


class StateStore(Protocol):
    """See the module. Another owner's state is not found, like one that never was.

    Attributes:
        files_folder: where the files are that are held or being written; the engine's too.
    """

    @property
    def files_folder(self) -> Path: ...

    @property
    def totals(self) -> StoreTotals:
        """How much there is, as of the last change; without waiting."""
        ...

    def room(self, num_snapshots: int, *, bytes_each: int) -> AbstractAsyncContextManager[Room]:
        """Space for snapshots; what is not kept when the context is left is removed.

        Raises:
            StorageFullError: the budget is used up, and nothing may be evicted.
        """
        ...

    def hold(self, snapshot: SnapshotRecord) -> AbstractAsyncContextManager[str]:
        """The snapshot's file, here and not removed for as long as the context is open."""
        ...

    async def add(self, new: NewState) -> StateRecord:
        """Keeps a snapshot as a state.

        Raises:
            StateConflictError: the owner has a state of that name.
        """
        ...

    async def get(self, owner: str, state_id: str) -> StateRecord:
        """Raises `NotFoundError`."""
        ...

    async def use(self, owner: str, state_id: str) -> StateRecord:
        """Like `get`, and its time to live begins again."""
        ...

    async def list_states(self, owner: str, *, limit: int, after: str | None, name: str | None) -> list[StateRecord]:
        """The owner's states, newest first; those after the id `after`, or those of a name."""
        ...

    async def delete(self, owner: str, state_id: str) -> None:
        """Raises `NotFoundError`."""
        ...

    async def advance(self, record: StateRecord, head: SnapshotRecord) -> StateRecord:
        """Gives a state a new head.

        Raises:
            NotFoundError: it was deleted meanwhile.
            StateConflictError: it has another head than the record says.
        """
        ...

    async def mark(self, owner: str, state_id: str, point: str) -> StateRecord:
        """Names the position where the state is; moves the name if it is in use. Raises `NotFoundError`."""
        ...

    async def rewind(self, owner: str, state_id: str, point: str) -> StateRecord:
        """Puts the state back to a point; raises `NotFoundError` for either."""
        ...

    async def put_response(self, response: ResponseRecord) -> None:
        """Keeps a response, or replaces it."""
        ...

    async def get_response(self, owner: str, response_id: str) -> ResponseRecord:
        """Raises `NotFoundError`."""
        ...

    async def use_response(self, response_id: str) -> None:
        """Its time to live begins again."""
        ...

    async def delete_response(self, owner: str, response_id: str) -> None:
        """Raises `NotFoundError`."""
        ...

    async def close(self) -> None:
        """Everything is on the disk afterwards. May be called twice."""
        ...


class StateConflictError(InvalidRequestError):
    """Something else has the name, or was faster."""

    def __init__(self, message: str, *, param: str, code: str) -> None:
        super().__init__(message, param=param, code=code, status=409)
        self.headers["x-should-retry"] = "false"


class StorageFullError(ApiError):
    """The budget for states is used up."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="state_storage_full", status=507, headers={"x-should-retry": "false"})


def name_taken(name: str) -> StateConflictError:
    """The owner has a state of that name."""
    return StateConflictError(f"you have a state named {name!r}", param="name", code="state_name_taken")


def state_not_found(state_id: str, *, param: str | None = "state_id") -> NotFoundError:
    """The one answer to ids that are unknown, expired, deleted, or another owner's."""
    return NotFoundError(f"there is no state {state_id[:100]!r}", param=param, code="state_not_found")


def point_not_found(point: str) -> NotFoundError:
    """The state has no point of that name."""
    return NotFoundError(f"the state has no point {point[:100]!r}", param="point", code="point_not_found")


def response_not_found(response_id: str, *, param: str | None = None) -> NotFoundError:
    """The one answer to ids of responses that are unknown, expired, deleted, or another owner's."""
    return NotFoundError(f"there is no response {response_id[:100]!r}", param=param, code="response_not_found")
