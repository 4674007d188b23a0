"""Everything that can go wrong for a user of the client.

ClientError
├── APIConnectionError            no (complete) answer: refused, broken, cut off
│   └── APITimeoutError           the server was silent for longer than the timeout
├── APIResponseError              an answer that no OpenAI-style server gives
└── APIError                      the server says what is wrong: message, type, param, code
    ├── StreamError               ... in the middle of a stream, after its 200
    └── APIStatusError            ... as an HTTP status, with the request id
        ├── BadRequestError           400, 413, 415, 422
        ├── AuthenticationError       401
        ├── PermissionDeniedError     403
        ├── NotFoundError             404
        ├── ConflictError             409
        ├── RateLimitError            429
        └── ServerError               5xx
            └── OverloadedError       503
"""

import json
from collections.abc import Mapping
from typing import Any, Self

import httpx

MAX_QUOTED_CHARACTERS = 200


class ClientError(Exception):
    """Base of all errors of this package."""


class APIConnectionError(ClientError):
    """The server could not be reached, or the connection broke before the answer was complete."""


class APITimeoutError(APIConnectionError):
    """The server was silent for longer than the timeout."""


class APIResponseError(ClientError):
    """The server answered, but not as an OpenAI-style server does."""


class APIError(ClientError):
    """The server says what is wrong.

    Attributes:
        message: for people.
        type: OpenAI's coarse class, e.g. `invalid_request_error`; None if not given.
        param: the request field at fault, if there is one.
        code: stable machine-readable name, e.g. `context_length_exceeded`, if there is one.
    """

    def __init__(
        self, message: str, *, type: str | None = None, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.type = type
        self.param = param
        self.code = code

    @classmethod
    def from_body(cls, error: object) -> Self:
        """From the value of `error` in the envelope; servers also send a plain string there."""
        return cls(**_error_fields(error))


class StreamError(APIError):
    """The request failed after its stream had begun."""


class APIStatusError(APIError):
    """An answer with a status of 400 or more.

    Attributes:
        status: the HTTP status.
        request_id: the server's name for the request, for its logs.
        response: the whole answer.
    """

    def __init__(
        self,
        message: str,
        *,
        response: httpx.Response,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, type=type, param=param, code=code)
        self.response = response
        self.status = response.status_code
        self.request_id = response.headers.get("x-request-id")


class BadRequestError(APIStatusError):
    """The request can never work as it is."""


class AuthenticationError(APIStatusError):
    """No key, or a wrong one."""


class PermissionDeniedError(APIStatusError):
    """The key is known but not allowed to do this."""


class NotFoundError(APIStatusError):
    """No such model, route or object."""


class ConflictError(APIStatusError):
    """The object is in use; the request may work in a moment."""


class RateLimitError(APIStatusError):
    """Too many requests for this key."""


class ServerError(APIStatusError):
    """The server failed."""


class OverloadedError(ServerError):
    """The server cannot take the request just now: full, loading, restarting, or going down."""


_BY_STATUS: Mapping[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: BadRequestError,
    415: BadRequestError,
    422: BadRequestError,
    429: RateLimitError,
    503: OverloadedError,
}


def status_error(response: httpx.Response) -> APIStatusError:
    """The typed error of an answer whose body was read and whose status is 400 or more."""
    kind = _BY_STATUS.get(response.status_code)
    if kind is None:
        kind = ServerError if response.status_code >= 500 else APIStatusError
    return kind(response=response, **_error_fields(_error_of(response)))


def _error_of(response: httpx.Response) -> object:
    try:
        body = response.json()
    except ValueError:
        body = None
    if isinstance(body, dict):
        # FastAPI's own errors, from servers in front of which no envelope was put, say `detail`.
        return body.get("error", body.get("detail", body))
    return f"HTTP {response.status_code}: {response.text[:MAX_QUOTED_CHARACTERS]}".rstrip(": \n")


def _error_fields(error: object) -> dict[str, Any]:
    if not isinstance(error, dict):
        return {"message": str(error)}
    message = error.get("message")
    fields: dict[str, Any] = {"message": message if isinstance(message, str) else json.dumps(error)}
    for key in ("type", "param", "code"):
        value = error.get(key)
        fields[key] = None if value is None else str(value)
    return fields
