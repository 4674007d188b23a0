"""Everything that can go wrong for a client of the service; `server.http.errors` says what it is on the wire.

ServiceError
├── InvalidRequestError         the request can never work as it is
│   └── ContextLengthError      the prompt is over the operator's limit
├── AuthenticationError         no key, or a wrong one
├── NotFoundError               no such model, route or object
├── ConflictError               something else has the name, or was faster
├── RateLimitError              the key has used up its minute
├── DeadlineError               the request ran longer than it may
├── UnavailableError            not just now
│   ├── OverloadedError         the queue is full
│   ├── ShutdownError           the answer was cut off; names the states to resume from
│   ├── ReplicaLostError        the server that made the answer is gone; names the state that it began from
│   └── EngineUnavailableError  loading, restarting, draining
└── InternalError               our bug
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SHUTDOWN_RETRY_S = 5


@dataclass(eq=False)
class ServiceError(Exception):
    """Base.

    Attributes:
        message: a sentence for the client; it names no path and no host.
        param: the field of the request that is concerned; None: none, or that of the kind of error.
        code: stable name for programs; None: that of the kind of error.
    """

    message: str
    param: str | None = None
    code: str | None = None

    def __str__(self) -> str:
        return self.message


class InvalidRequestError(ServiceError):
    """The request can never work as it is."""


class ContextLengthError(InvalidRequestError):
    """The prompt is over the limit that the operator set."""


class AuthenticationError(ServiceError):
    """No key, or a wrong one."""


class NotFoundError(ServiceError):
    """No such model, route or object (or not for this caller)."""


class ConflictError(ServiceError):
    """Something else has the name, was faster, or is being done already."""


class DeadlineError(ServiceError):
    """The request ran longer than its `timeout`, or than the operator allows."""


@dataclass(eq=False)
class RateLimitError(ServiceError):
    """The key has asked for more than it may in a minute; try again after `retry_after_s` seconds."""

    retry_after_s: int = 1


@dataclass(eq=False)
class UnavailableError(ServiceError):
    """The service cannot take the request just now; try again after `retry_after_s` seconds."""

    retry_after_s: int = 2


@dataclass(eq=False)
class OverloadedError(UnavailableError):
    """As many requests wait as the operator allows."""

    retry_after_s: int = 1


class EngineUnavailableError(UnavailableError):
    """The engine is loading, restarting or draining."""


class ShutdownError(UnavailableError):
    """The server stopped before the answer was complete.

    Attributes:
        choices: for each answer `index`, `state_id` (null if there is nothing to resume from) and `completion_tokens`,
            and the `text` so far where the client has not had it.
    """

    def __init__(self, choices: list[dict[str, Any]]) -> None:
        self.choices = choices
        ids = [choice["state_id"] for choice in choices if choice["state_id"] is not None]
        self.state_id: str | None = ids[0] if len(choices) == len(ids) == 1 else None
        what = "send the request again" if self.state_id is None else f"resume from its state, {self.state_id}"
        if len(choices) > 1 and ids:
            what = "resume from the states in `choices`"
        super().__init__(
            f"the server was stopped before the answer was complete; {what}", retry_after_s=SHUTDOWN_RETRY_S
        )


class ReplicaLostError(UnavailableError):
    """The server that made the answer is gone before it was complete.

    Attributes:
        state_id: of the saved state that the answer began from, which is as it was; None: it began from none.
    """

    def __init__(self, state_id: str | None) -> None:
        self.state_id = state_id
        what = "" if state_id is None else f"; its state {state_id} is as it was before"
        super().__init__(
            f"the server was lost before the answer was complete{what}: send the request again", retry_after_s=1
        )


class InternalError(ServiceError):
    """Our bug, or a failure inside the engine. The message names no path and no traceback."""

    def __init__(self, message: str = "internal error", *, code: str | None = None) -> None:
        super().__init__(message, code=code)


@contextmanager
def renamed_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about a field name it as the client's dialect does; `names`: field here -> field there."""
    try:
        yield
    except ServiceError as error:
        own = error.param
        if own is not None and own in names:
            theirs = names[own]
            error.message = error.message.replace(f"`{own}`", f"`{theirs}`")
            if error.message.startswith(f"{own}:"):
                error.message = theirs + error.message.removeprefix(own)
            error.param = theirs
        raise
