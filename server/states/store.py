"""What a store of states promises, and what it holds.

A *snapshot* is one immutable file, a conversation at one position. A *state* is a handle with an id and an owner whose
head is a snapshot; advancing it gives it another head, a named *point* remembers one, a fork is another handle with the
same head. A stored *response* has a snapshot of its own. A snapshot lives as long as anything refers to it or uses it.

One folder with an SQLite index is the default; replicas share a PostgreSQL. Both keep to the protocol below.
"""

import secrets
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from server.states.errors import point_not_found

SUSPENDED = "queued"
"""Status of a stored response that nobody makes just now: its server was stopped, and it goes on at any."""
UNFINISHED = frozenset((SUSPENDED, "in_progress"))
"""Statuses of a stored response that is still being made, or will be."""
REPLAY_KEY = "_unfinished"
"""Where the body of a stored response has what a server needs to go on with it, or to begin it again."""
CURSOR_PREFIX = "page_"


class TurnEnd(StrEnum):
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
        held_by: name of the server that wrote it, which may still have a copy; empty: unknown, or there is one alone.
    """

    file: str
    position: int
    pending: tuple[int, ...]
    last_token: int
    turn: TurnEnd
    num_bytes: int
    fingerprint: str
    held_by: str = ""

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
        number: larger than that of every state before it.
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
    number: int = 0

    @property
    def cursor(self) -> str:
        """Where it stands in the list of its owner's states, though it should be deleted: for `list_states`."""
        return f"{CURSOR_PREFIX}{self.number:x}"

    @property
    def expires(self) -> float | None:
        return None if self.ttl_s is None else self.used + self.ttl_s

    def at(self, point: str | None) -> SnapshotRecord:
        """Its head, or a point of that name; raises `NotFoundError`."""
        if point is None:
            return self.head
        found = [item.snapshot for item in self.points if item.name == point]
        if not found:
            raise point_not_found(point)
        return found[0]


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
        fingerprint: of the model that makes it; empty: any may.
    """

    id: str
    owner: str
    created: float
    ttl_s: float | None
    body: Mapping[str, Any]
    input_items: tuple[Mapping[str, Any], ...]
    snapshot: SnapshotRecord | None
    fingerprint: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether it will not change any more."""
        return self.body["status"] not in UNFINISHED

    @property
    def is_suspended(self) -> bool:
        """Whether it waits for a server to go on with it."""
        return bool(self.body["status"] == SUSPENDED)

    @property
    def can_go_on(self) -> bool:
        """Whether any server may go on with it, or begin it again, when its own is gone."""
        return self.body.get("background") is True and REPLAY_KEY in self.body

    def claimed(self) -> "ResponseRecord":
        """The same response, being made again."""
        return replace(self, body={**self.body, "status": "in_progress"})

    def suspended(self) -> "ResponseRecord":
        """The same response, waiting."""
        return replace(self, body={**self.body, "status": SUSPENDED})

    def failed(self, *, code: str | None, message: str) -> "ResponseRecord":
        """The same response, failed."""
        error = {"code": "server_error" if code is None else code, "message": message}
        return replace(self, body={**self.body, "status": "failed", "error": error})

    def broken_off(self) -> "ResponseRecord":
        """The same response, failed: nobody makes it any more."""
        message = "the response was broken off: its server was stopped, or its client left"
        return self.failed(code=None, message=message)

    def cancelled(self) -> "ResponseRecord":
        """The same response, cancelled."""
        return replace(self, body={**self.body, "status": "cancelled"})


@dataclass(frozen=True, slots=True)
class StoreTotals:
    """What a store holds: states of all owners, bytes of all that is kept, how many it may, and whether it answers."""

    num_states: int
    num_bytes: int
    max_bytes: int
    is_up: bool = True


@dataclass(frozen=True, slots=True)
class Reservation:
    """Space that is kept free for snapshots that are being written.

    Attributes:
        folder: where to write them.
        files: names to write them under.
    """

    folder: Path
    files: tuple[str, ...]

    def path(self, number: int) -> Path:
        """Of one of the files."""
        return self.folder / self.files[number]


def new_state_id() -> str:
    """Not to be guessed."""
    return f"state_{secrets.token_hex(16)}"


Change = Callable[[ResponseRecord], ResponseRecord]


def new_file() -> str:
    """A snapshot's name; no two are the same, on any machine."""
    return f"{secrets.token_hex(20)}.safetensors"


class StateStore(Protocol):
    """See the module. Another owner's state is not found, like one that never was.

    A store that cannot be reached raises `StoreUnavailableError` from every method but `start`, `end_response` and
    `close`, and works again as soon as it is back.
    """

    @property
    def files_folder(self) -> Path:
        """For the engine alone, which reads what is held, and writes where room is kept."""
        ...

    @property
    def totals(self) -> StoreTotals:
        """How much there is, as of the last change; without waiting."""
        ...

    async def start(self, on_response_gone: Callable[[str], None]) -> None:
        """Begins what goes on by itself.

        Args:
            on_response_gone: called with the id of a response that is being made here, and was cancelled or deleted
                elsewhere.
        """

    def room(self, num_snapshots: int, *, bytes_each: int, owner: str) -> AbstractAsyncContextManager[Reservation]:
        """Space for snapshots; what is not kept when the context is left is removed.

        Raises:
            StorageFullError: the owner's budget is used up, or that of all, and nothing of the owner's may be evicted.
        """

    def hold(
        self, snapshot: SnapshotRecord, *, of: "StateRecord | ResponseRecord | None" = None
    ) -> AbstractAsyncContextManager[Path]:
        """The snapshot's file, here and not removed for as long as the context is open.

        Args:
            of: the state or response that is gone on from: it does not expire meanwhile, and its time to live begins
                again at the end.

        Raises:
            NotFoundError: it was deleted since it was looked up.
        """

    async def add(self, new: NewState) -> StateRecord:
        """Keeps a snapshot as a state.

        Raises:
            StateConflictError: the owner has a state of that name.
        """

    async def fork(
        self, owner: str, state_id: str, *, point: str | None, name: str | None, ttl_s: float | None
    ) -> StateRecord:
        """A second state with the head, or a point, of a first one, which counts as used.

        Raises:
            NotFoundError: there is no such state, or point.
            StateConflictError: the owner has a state of that name.
            StorageFullError: see `room`.
        """
        ...

    async def get(self, owner: str, state_id: str) -> StateRecord:
        """Raises `NotFoundError`."""

    async def use(self, owner: str, state_id: str) -> StateRecord:
        """Like `get`, and its time to live begins again."""
        ...

    async def list_states(self, owner: str, *, limit: int, after: str | None, name: str | None) -> list[StateRecord]:
        """The owner's states, newest first.

        Args:
            after: only those after the state of this id, or after this cursor.
            name: only the one of this name.

        Raises:
            NotFoundError: there is no such state, or it is no cursor.
        """
        ...

    async def delete(self, owner: str, state_id: str) -> None:
        """Raises `NotFoundError`."""

    async def advance(self, record: StateRecord, head: SnapshotRecord) -> StateRecord:
        """Gives a state a new head.

        Raises:
            NotFoundError: it was deleted meanwhile.
            StateConflictError: it has another head than the record says.
        """
        ...

    async def mark(self, owner: str, state_id: str, point: str) -> StateRecord:
        """Names the position where the state is; moves the name if it is in use.

        Raises:
            NotFoundError: there is no such state.
            StorageFullError: see `room`.
        """
        ...

    async def rewind(self, owner: str, state_id: str, point: str) -> StateRecord:
        """Puts the state back to a point; raises `NotFoundError` for either."""
        ...

    async def begin_response(self, response: ResponseRecord) -> bool:
        """Keeps a response that begins to be made here; false, and nothing is changed, if there is one of its id.

        Raises:
            StorageFullError: see `room`.
        """
        ...

    async def put_response(self, response: ResponseRecord) -> None:
        """Keeps a response, or what has become of one that is being made here.

        One that has ended stays as it is, and one that was deleted meanwhile stays deleted. One that is suspended is
        not made here any more.

        Raises:
            StorageFullError: see `room`; never for one that has ended and has hardly more text than it had.
        """
        ...

    async def claim_responses(self, limit: int, *, fingerprint: str) -> list[ResponseRecord]:
        """Responses that were suspended, or whose server is gone, and that are made here from now on, the oldest first.

        Cheap if there are none.

        Args:
            fingerprint: of the model here; those of another one wait for it.
        """
        ...

    async def end_response(self, response_id: str) -> None:
        """Nobody makes this response any more: if it is kept and has not ended, it has failed. May be called twice."""

    async def get_response(self, owner: str, response_id: str) -> ResponseRecord:
        """Raises `NotFoundError`."""

    async def use_response(self, response_id: str) -> None:
        """Its time to live begins again."""

    async def change_response(self, owner: str, response_id: str, change: Change) -> ResponseRecord:
        """Changes body and items of a response that has ended, at once for everybody; what it is now.

        Raises:
            NotFoundError: there is no such response; and whatever `change` raises.
            StorageFullError: see `room`.
        """

    async def cancel_response(self, owner: str, response_id: str) -> ResponseRecord:
        """Cancels a response unless it has ended, and tells whoever makes it; what it is now.

        Raises:
            NotFoundError: there is no such response.
        """

    async def delete_response(self, owner: str, response_id: str) -> None:
        """Raises `NotFoundError`."""

    async def close(self) -> None:
        """Everything is kept afterwards. May be called twice."""
