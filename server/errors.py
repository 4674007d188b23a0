"""Everything that can go wrong for a client of the service, and its one mapping to the wire.

ApiError                      -> {"error": {"message", "type", "param", "code"}}
├── InvalidRequestError       400
│   └── ContextLengthError    400 context_length_exceeded
├── AuthenticationError       401
├── NotFoundError             404
├── RateLimitError            429 + Retry-After
├── DeadlineError             504 timeout (never worth a retry: the deadline was the request's own)
├── UnavailableError          503 + Retry-After
│   ├── OverloadedError       503 overloaded (the queue is full)
│   ├── ShutdownError         503 server_shutdown (the answer was cut off; names the state to go on from)
│   └── EngineUnavailableError 503 (loading, restarting, draining)
└── InternalError             500 internal_error
"""

import json
from dataclasses import dataclass, field
from typing import Any

SHUTDOWN_RETRY_S = 5


@dataclass(slots=True, eq=False)
class ApiError(Exception):
    """Base: a message for the client, and where it belongs in the OpenAI error body."""

    message: str
    param: str | None = None
    code: str | None = None
    status: int = 500
    type: str = "server_error"
    headers: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    """Further keys of the error body, for the few errors that have any."""

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, dict[str, Any]]:
        """The error envelope; all four keys are always there."""
        known = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": known | self.details}

    def to_json(self) -> bytes:
        """The envelope as UTF-8 JSON."""
        return json.dumps(self.body()).encode()


class InvalidRequestError(ApiError):
    """The request can never work as it is."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message, param=param, code=code, status=status, type="invalid_request_error")


class ContextLengthError(InvalidRequestError):
    """The prompt is over the limit that the operator set."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class AuthenticationError(ApiError):
    """No key, or a wrong one."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            code="invalid_api_key",
            status=401,
            type="authentication_error",
            headers={"WWW-Authenticate": "Bearer"},
        )


class NotFoundError(ApiError):
    """No such model, route or object (or not for this caller)."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code, status=404, type="invalid_request_error")


class RateLimitError(ApiError):
    """The key has asked for more than it may in a minute; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(
            message,
            code="rate_limit_exceeded",
            status=429,
            type="rate_limit_error",
            headers={"Retry-After": str(max(1, retry_after_s))},
        )


class DeadlineError(ApiError):
    """The request ran longer than its `timeout`, or than the operator allows."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="timeout", status=504, type="timeout_error", headers={"x-should-retry": "false"})


class UnavailableError(ApiError):
    """The service cannot take the request just now; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, code: str, retry_after_s: int) -> None:
        super().__init__(
            message,
            code=code,
            status=503,
            type="server_error",
            headers={"Retry-After": str(retry_after_s)},
        )


class OverloadedError(UnavailableError):
    """As many requests wait as the operator allows."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, code="overloaded", retry_after_s=retry_after_s)


class ShutdownError(UnavailableError):
    """The server stopped before the answer was complete.

    `choices` has an entry for each answer: `index`, `state_id` (null if there is nothing to go on from) and
    `completion_tokens`, and the `text` so far where the client has not had it.
    """

    def __init__(self, choices: list[dict[str, Any]]) -> None:
        ids = [choice["state_id"] for choice in choices if choice["state_id"] is not None]
        what = f"resume from its state, {ids[0]}" if len(choices) == len(ids) == 1 else "send the request again"
        if len(choices) > 1 and ids:
            what = "resume from the states in `choices`"
        super().__init__(
            f"the server was stopped before the answer was complete; {what}",
            code="server_shutdown",
            retry_after_s=SHUTDOWN_RETRY_S,
        )
        self.details |= {"state_id": ids[0] if len(choices) == len(ids) == 1 else None, "choices": choices}


class EngineUnavailableError(UnavailableError):
    """The engine is loading, restarting or draining."""

    def __init__(self, message: str, *, code: str = "engine_unavailable", retry_after_s: int = 2) -> None:
        super().__init__(message, code=code, retry_after_s=retry_after_s)


class InternalError(ApiError):
    """Our bug, or a failure inside the engine. The message names no path and no traceback."""

    def __init__(self, message: str = "internal error", *, code: str = "internal_error") -> None:
        super().__init__(message, code=code, status=500, type="server_error")
