"""The four forms of a completion prompt (text, token ids, or a list of either), and predictions of answers."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.protocol.wire import RequestModel

Prompt = str | list[int]


def parse_prompts(value: object) -> list[Prompt]:
    """The prompts of a request, at least one, none of them empty.

    Raises:
        PydanticCustomError: any other form; nothing is converted (`true` and `1.0` are no token ids).
    """
    if isinstance(value, str):
        return [_text(value)]
    if not isinstance(value, list):
        raise _error("must be a string, a list of strings, a list of token ids, or a list of such lists")
    if not value:
        raise _error("is empty")
    if isinstance(value[0], str):
        return [_text(item) for item in value]
    if isinstance(value[0], list):
        return [_token_ids(item) for item in value]
    return [_token_ids(value)]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _error("mixes strings with something else")
    if not value:
        raise _error("is empty; at least one token is needed")
    return value


def _token_ids(value: object) -> list[int]:
    if not isinstance(value, list):
        raise _error("mixes lists of token ids with something else")
    if not value:
        raise _error("holds an empty list; at least one token is needed")
    return check_token_ids(value)


def check_token_ids(values: list[Any]) -> list[int]:
    """The list itself, if all its items are integers from 0 on."""
    for token_id in values:
        if type(token_id) is not int:
            raise _error("holds something that is not an integer token id")
        if token_id < 0:
            raise _error(f"holds the negative token id {token_id}")
    return values


def _error(message: str) -> PydanticCustomError:
    return PydanticCustomError("prompt", "{reason}", {"reason": message})


Prompts = Annotated[
    list[Any],
    BeforeValidator(parse_prompts),
    WithJsonSchema(
        {
            "oneOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
                {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
                },
            ]
        }
    ),
]


def _joined_parts(value: object) -> object:
    """Text parts `[{"type": "text", "text": "..."}]` as one text."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise PydanticCustomError("prediction", "content must be a string or a list of parts of type 'text'")
        texts.append(text)
    return "".join(texts)


class Prediction(RequestModel):
    """The expected answer, such as a file of which little is going to change."""

    type: Literal["content"]
    """What is predicted: the text of the answer."""
    content: Annotated[
        str,
        BeforeValidator(_joined_parts),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                            "required": ["type", "text"],
                        },
                    },
                ]
            }
        ),
    ]
    """The text, or a list of text parts, which are put together."""
