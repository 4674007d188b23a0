"""The beginning of a call in the text of an answer: `{"name": NAME, "arguments": {...}`, and where its object ends."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # what JSONDecoder itself is made of

WHITESPACE = " \n\r\t"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Head:
    """What a call begins with: its name, and where its arguments begin; or all of them, and where the call ends."""

    name: str
    position: int
    arguments: str | None = None


class IncompleteError(Exception):
    """More text is needed to tell."""


class NoCallError(Exception):
    """This is not a call."""


class ObjectScanner:
    """Finds the end of a JSON object by its braces, character by character, strings left aside."""

    def __init__(self, depth: int = 0) -> None:
        """`depth`: how many braces are open already."""
        self.is_done = False
        self._depth = depth
        self._in_string = False
        self._is_escaped = False

    def feed(self, text: str) -> int:
        """How many characters of the text belong to the object."""
        for number, character in enumerate(text, start=1):
            self._take(character)
            if self.is_done:
                return number
        return len(text)

    def _take(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif self._in_string:
            self._is_escaped = character == "\\"
            self._in_string = character != '"'
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.is_done = self._depth <= 0


def read_head(text: str, names: Collection[str]) -> Head:
    """Reads `{"name": NAME, "arguments": `, in any order, with anything else between.

    Args:
        text: from the brace on.
        names: those of the tools that may be called.

    Raises:
        IncompleteError: more text is needed.
        NoCallError: it is something else.
    """
    position = _expect(text, 0, "{")
    name: str | None = None
    arguments: str | None = None
    while True:
        key, position = _string(text, _expect(text, position, '"'))
        position = _skip(text, _expect(text, position, ":"))
        is_arguments = key in ("arguments", "parameters")
        if is_arguments and name is not None and _at(text, position) == "{":
            return Head(name, position)
        value, end = _value(text, position)
        if key == "name":
            name = _known(value, names)
        if is_arguments:
            arguments = _as_text(value, text[position:end])
        separator = _at(text, _skip(text, end))
        position = _skip(text, end) + 1
        if separator == "}" and name is not None:
            return Head(name, position, "{}" if arguments is None else arguments)
        if separator != ",":
            raise NoCallError


def _known(value: object, names: Collection[str]) -> str:
    if not isinstance(value, str) or value not in names:
        raise NoCallError
    return value


def _as_text(value: object, written: str) -> str:
    """Arguments are an object; some models write its text as a string, or null for none."""
    if value is None:
        return "{}"
    return value if isinstance(value, str) else written


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in WHITESPACE:
        position += 1
    return position


def _at(text: str, position: int) -> str:
    if position >= len(text):
        raise IncompleteError
    return text[position]


def _expect(text: str, position: int, character: str) -> int:
    position = _skip(text, position)
    if _at(text, position) != character:
        raise NoCallError
    return position + 1


def _string(text: str, position: int) -> tuple[str, int]:
    try:
        value, end = scanstring(text, position, True)
    except ValueError as error:
        raise IncompleteError from error
    return str(value), int(end)


def _value(text: str, position: int) -> tuple[object, int]:
    """A whole value. A number is whole only when something comes behind it."""
    try:
        value, end = _DECODER.raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        raise IncompleteError from error
    _at(text, end)
    return value, end
