"""The base of all wire types, and the one way in which a validation error becomes an API error."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from server.errors import InvalidRequestError
from server.protocol.unsupported import refuse_unsupported

MAX_ERRORS = 10
MAX_ERROR_CHARACTERS = 200


class RequestModel(BaseModel):
    """Base of requests: `"5"` is not 5, `true` is not 1, floats are finite, unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True)
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Known fields that are not built, and the values of each that ask for nothing."""
    other_names: ClassVar[Mapping[str, str]] = {}
    """Names of other servers for what has a field here."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        refuse_unsupported(body, cls.refused)
        return body


class ResponseModel(BaseModel):
    """Base of answers. They are written with `exclude_unset`: what is not set is not on the wire."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid")

    def to_json(self) -> bytes:
        """UTF-8 JSON without the fields that were not set."""
        return self.model_dump_json(exclude_unset=True).encode()


class ErrorDetails(ResponseModel):
    """What went wrong."""

    message: str
    """In words, for a person."""
    type: str
    """Kind of error, such as `invalid_request_error`."""
    param: str | None
    """The field concerned, such as `messages[0].role`."""
    code: str | None
    """Stable name for programs, such as `context_length_exceeded`."""
    state_id: str | None = None
    """Only with the code `server_shutdown`: the state to resume from, if there is one answer and it has one."""
    choices: list[dict[str, Any]] = []
    """Only with the code `server_shutdown`: how far each answer had come, and its `state_id`."""


class StateError(ResponseModel):
    """Why the state of an answer, or a response, was not kept; the answer is whole."""

    code: str | None
    """Stable name for programs: `state_store_unavailable`, `state_storage_full`, `state_not_saved`."""
    message: str
    """In words, for a person."""


class ErrorEnvelope(ResponseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetails
    """What went wrong."""


_OF_BODIES = {
    "missing": "the body is missing",
    "model_type": "the body must be a JSON object",
    "model_attributes_type": "the body must be a JSON object",
    "dict_type": "the body must be a JSON object",
}
"""What pydantic finds of a body as a whole, in words."""


@contextmanager
def translated() -> Iterator[None]:
    """What is wrong with a request of another dialect, once it is one of ours, is the client's too."""
    try:
        yield
    except ValidationError as error:
        raise validation_error([{**item} for item in error.errors()]) from None


def validation_error(errors: Sequence[Mapping[str, Any]]) -> InvalidRequestError:
    """One 400 for the errors that pydantic found; `param` is the first field concerned.

    The message is bounded: at most 10 errors of 200 characters, and nothing of the input is repeated.
    """
    shown = [_describe(error)[:MAX_ERROR_CHARACTERS] for error in errors[:MAX_ERRORS]]
    if len(errors) > MAX_ERRORS:
        shown.append(f"and {len(errors) - MAX_ERRORS} more")
    first = errors[0]
    code = None if first["type"] in {"json_invalid", "missing"} else "invalid_value"
    # Of a body that is no JSON the location is a place in its text, and no field.
    param = None if first["type"] == "json_invalid" else field_path(first["loc"])
    return InvalidRequestError("; ".join(shown), param=param, code=code)


def field_path(location: Sequence[str | int]) -> str | None:
    """`("body", "messages", 0, "role")` -> `messages[0].role`; None for the body as a whole."""
    path = ""
    for part in location[1:] if location and location[0] in ("body", "query", "path") else location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path[:MAX_ERROR_CHARACTERS] or None


def _describe(error: Mapping[str, Any]) -> str:
    if error["type"] == "json_invalid":
        place = f" (at character {error['loc'][-1]})" if isinstance(error["loc"][-1], int) else ""
        return f"the body is not valid JSON: {error.get('ctx', {}).get('error', 'syntax error')}{place}"
    path = field_path(error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if path is not None:
        return f"{path}: {message}"
    return _OF_BODIES.get(error["type"], f"the body: {message}")
