"""The one table from what can go wrong to the wire: status, type, param, code and headers; and the envelope."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.responses import Response

from server import errors
from server.errors import RateLimitError, ReplicaLostError, ServiceError, ShutdownError, UnavailableError
from server.states import errors as states

INVALID = "invalid_request_error"
NO_RETRY = {"x-should-retry": "false"}
"""To the official client, which would try again after 408, 409, 429 and all of 500 and above."""
ELSEWHERE = {"X-Dijiang-Retry": "another-replica"}
"""To a balancer: only this server cannot take the request, another one may, now; nothing of the answer was sent."""


class WireError(NamedTuple):
    """What an error is on the wire. A param and a code that an error has itself win over these."""

    status: int
    type: str = "server_error"
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = {}


@dataclass(eq=False)
class HttpError(ServiceError):
    """Something is wrong with the exchange itself: its route, method, headers or body."""

    status: int = 400
    headers: dict[str, str] = field(default_factory=dict)


TABLE: Mapping[type[ServiceError], WireError] = {
    errors.InvalidRequestError: WireError(400, INVALID),
    errors.ContextLengthError: WireError(400, INVALID, "context_length_exceeded"),
    errors.AuthenticationError: WireError(
        401, "authentication_error", "invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
    ),
    errors.NotFoundError: WireError(404, INVALID),
    states.StateNotFoundError: WireError(404, INVALID, "state_not_found", "state_id"),
    states.PointNotFoundError: WireError(404, INVALID, "point_not_found", "point"),
    states.ResponseNotFoundError: WireError(404, INVALID, "response_not_found"),
    errors.ConflictError: WireError(409, INVALID, headers=NO_RETRY),
    states.StateConflictError: WireError(409, INVALID, "state_conflict", "state_id", NO_RETRY),
    states.StateNameTakenError: WireError(409, INVALID, "state_name_taken", "name", NO_RETRY),
    errors.RateLimitError: WireError(429, "rate_limit_error", "rate_limit_exceeded"),
    errors.InternalError: WireError(500, code="internal_error"),
    errors.UnavailableError: WireError(503),
    errors.OverloadedError: WireError(503, code="overloaded", headers=ELSEWHERE),
    errors.ShutdownError: WireError(503, code="server_shutdown", headers=ELSEWHERE),
    errors.ReplicaLostError: WireError(503, code="replica_lost"),
    errors.EngineUnavailableError: WireError(503, code="engine_unavailable", headers=ELSEWHERE),
    states.StoreUnavailableError: WireError(503, code="state_store_unavailable"),
    errors.DeadlineError: WireError(504, "timeout_error", "timeout", headers=NO_RETRY),
    states.StorageFullError: WireError(507, code="state_storage_full", headers=NO_RETRY),
}


def on_wire(error: ServiceError) -> WireError:
    """What the table says of an error, and the error of itself."""
    row = next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), WireError(500))
    headers = dict(row.headers)
    if isinstance(error, HttpError):
        row = row._replace(status=error.status, type=INVALID)
        headers |= error.headers
    if isinstance(error, RateLimitError | UnavailableError):
        headers["Retry-After"] = str(max(1, error.retry_after_s))
    return row._replace(code=error.code or row.code, param=error.param or row.param, headers=headers)


def envelope(error: ServiceError) -> dict[str, dict[str, Any]]:
    """The body of every answer that is not a success; all four keys are always there."""
    wire = on_wire(error)
    body: dict[str, Any] = {"message": error.message, "type": wire.type, "param": wire.param, "code": wire.code}
    if isinstance(error, ShutdownError):
        body |= {"state_id": error.state_id, "choices": error.choices}
    if isinstance(error, ReplicaLostError):
        body |= {"state_id": error.state_id}
    return {"error": body}


def anthropic_envelope(error: ServiceError) -> dict[str, Any]:
    """The same in Anthropic's dialect."""
    wire = on_wire(error)
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large"}
    kinds |= {429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}
    kind = kinds.get(wire.status, "api_error" if wire.status >= 500 else INVALID)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def ollama_envelope(error: ServiceError) -> dict[str, Any]:
    """The same in Ollama's dialect."""
    return {"error": error.message}


DIALECTS: Mapping[str, Callable[[ServiceError], dict[str, Any]]] = {
    "/v1/messages": anthropic_envelope,
    "/api/": ollama_envelope,
}
"""Begin of the path -> the envelope of its dialect; elsewhere OpenAI's."""


def error_json(error: ServiceError, path: str = "") -> bytes:
    """The envelope as UTF-8 JSON, in the dialect of a path."""
    written = next((write for root, write in DIALECTS.items() if path.startswith(root)), envelope)
    return json.dumps(written(error)).encode()


def error_response(error: ServiceError, path: str) -> Response:
    """The envelope as a response."""
    wire = on_wire(error)
    return Response(
        error_json(error, path), status_code=wire.status, media_type="application/json", headers=dict(wire.headers)
    )
