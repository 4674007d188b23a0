"""What a client expects an answer to be, in large part: guesses that make it faster and change nothing."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.protocol.wire import RequestModel


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
