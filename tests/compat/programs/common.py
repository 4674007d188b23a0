"""What every program here asks, and how it says what it got."""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MODEL = sys.argv[1]
BASE_URL = os.environ["BASE_URL"]
ROOT_URL = BASE_URL.removesuffix("/v1")
QUESTION = "Hé?"
NOBODY = "nobody"
"""A model that is not there."""
SHORT = 8
LONG = 400


class Place(BaseModel):
    """A place."""

    model_config = ConfigDict(extra="forbid")  # or a random model never comes to the end of an object

    city: Literal["Paris", "Tokyo"]
    size: int = Field(ge=0, le=9)


SCHEMA = Place.model_json_schema()
FUNCTION: dict[str, Any] = {"name": "look_up", "description": "Looks up.", "parameters": SCHEMA, "strict": True}
TOOL: dict[str, Any] = {"type": "function", "function": FUNCTION}


def report(
    *, text: str, streamed: str, calls: Sequence[Any], structured: Sequence[Any], usage: Sequence[int], error: object
) -> None:
    """Writes what the test reads.

    Args:
        calls: arguments of tool calls, objects or their JSON.
        structured: answers that follow the schema, likewise.
        usage: tokens of answers of SHORT tokens.
        error: what a request for a model that is not there raised.
    """
    got = {
        "text": text,
        "streamed": streamed,
        "calls": [_plain(call) for call in calls],
        "structured": [_plain(answer) for answer in structured],
        "usage": list(usage),
        "error": f"{type(error).__name__}: {error}",
    }
    print(json.dumps(got))  # noqa: T201


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump()
    return json.loads(value) if isinstance(value, str) else value
