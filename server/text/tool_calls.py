"""Calls of tools in the text of an answer, in the form of Hermes and ChatML models, found while the text grows.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>

Around the calls is ordinary text. What only looks like a call (no such tool, no such form) stays text too. The
arguments of a call are handed on as they are written: whoever wants them to be valid JSON has the answer constrained.
The parts that come out do not depend on how the text was cut into pieces.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from json.decoder import scanstring  # type: ignore[attr-defined]  # what JSONDecoder itself is made of

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_HEAD_CHARACTERS = 16_384
"""Before a call's name and the beginning of its arguments are known; what is longer is text."""
_WHITESPACE = " \n\r\t"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class TextPart:
    """Ordinary text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallPart:
    """A call begins; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsPart:
    """The next piece of a call's arguments, JSON."""

    index: int
    text: str


Part = TextPart | CallPart | ArgumentsPart


class _Place(Enum):
    TEXT = "text"
    HEAD = "head"
    """Behind `OPEN`, before the arguments."""
    ARGUMENTS = "arguments"
    TAIL = "tail"
    """Behind the arguments; what is there up to `CLOSE` or the next `OPEN` is left out."""


@dataclass(frozen=True, slots=True)
class _Head:
    """What a call begins with: its name, and where its arguments begin; or all of them, and where they end."""

    name: str
    position: int
    arguments: str | None = None


class _IncompleteError(Exception):
    """More text is needed to tell."""


class _NoCallError(Exception):
    """This is not a call."""


class ToolCallParser:
    """Takes the text of one answer, in pieces.

    Attributes:
        num_calls: how many calls have begun.
    """

    def __init__(self, names: Collection[str]) -> None:
        """`names` are those of the tools that may be called."""
        self.num_calls = 0
        self._names = frozenset(names)
        self._place = _Place.TEXT
        self._buffer = ""
        self._held = ""
        self._follows_call = False
        self._scanner = _ObjectScanner()
        self._is_last = False

    def push(self, text: str) -> list[Part]:
        """Takes more text; returns what is certain by now."""
        self._buffer += text
        return self._advance()

    def finish(self) -> list[Part]:
        """Takes the end of the text; returns what was held back."""
        self._is_last = True
        return self._advance()

    def _advance(self) -> list[Part]:
        steps = {
            _Place.TEXT: self._text,
            _Place.HEAD: self._head,
            _Place.ARGUMENTS: self._arguments,
            _Place.TAIL: self._tail,
        }
        parts: list[Part] = []
        while steps[self._place](parts):
            pass
        return parts

    def _text(self, parts: list[Part]) -> bool:
        begin = self._buffer.find(OPEN)
        if begin >= 0:
            self._emit(parts, self._buffer[:begin])
            self._buffer = self._buffer[begin + len(OPEN) :]
            self._place = _Place.HEAD
            return True
        end = len(self._buffer) - (0 if self._is_last else _num_held(self._buffer))
        self._emit(parts, self._buffer[:end])
        self._buffer = self._buffer[end:]
        if self._is_last and self._held and not self.num_calls:
            parts.append(TextPart(self._held))
            self._held = ""
        return False

    def _emit(self, parts: list[Part], text: str) -> None:
        """Text, but for the white space around calls: what may turn out to be that is held back."""
        if self._follows_call:
            text = text.lstrip(_WHITESPACE)
            self._follows_call = not text
        visible = text.rstrip(_WHITESPACE)
        if visible:
            parts.append(TextPart(self._held + visible))
            self._held = ""
        self._held += text[len(visible) :]

    def _head(self, parts: list[Part]) -> bool:
        try:
            head = _read_head(self._buffer[:MAX_HEAD_CHARACTERS], self._names)
        except _IncompleteError:
            if not self._is_last and len(self._buffer) < MAX_HEAD_CHARACTERS:
                return False
            return self._no_call(parts)
        except _NoCallError:
            return self._no_call(parts)
        self._held, self._follows_call = "", True
        parts.append(CallPart(self.num_calls, head.name))
        self.num_calls += 1
        self._buffer = self._buffer[head.position :]
        self._scanner = _ObjectScanner()
        self._place = _Place.ARGUMENTS
        if head.arguments is not None:
            parts.append(ArgumentsPart(self.num_calls - 1, head.arguments))
            self._place = _Place.TAIL
        return True

    def _no_call(self, parts: list[Part]) -> bool:
        self._emit(parts, OPEN)
        self._place = _Place.TEXT
        return True

    def _arguments(self, parts: list[Part]) -> bool:
        length = self._scanner.feed(self._buffer)
        if length:
            parts.append(ArgumentsPart(self.num_calls - 1, self._buffer[:length]))
            self._buffer = self._buffer[length:]
        if self._scanner.is_done:
            self._place = _Place.TAIL
        return self._scanner.is_done

    def _tail(self, parts: list[Part]) -> bool:
        close, following = self._buffer.find(CLOSE), self._buffer.find(OPEN)
        if close >= 0 and not 0 <= following < close:
            self._buffer = self._buffer[close + len(CLOSE) :]
        elif following >= 0:
            self._buffer = self._buffer[following:]
        else:
            self._buffer = self._buffer[-len(CLOSE) :]
            return False
        self._place = _Place.TEXT
        return True


class _ObjectScanner:
    """Finds the end of a JSON object by its braces, character by character, strings left aside."""

    def __init__(self) -> None:
        self.is_done = False
        self._depth = 0
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


def _read_head(text: str, names: Collection[str]) -> _Head:
    """Reads `{"name": NAME, "arguments": `, in any order, with anything else between."""
    position = _expect(text, 0, "{")
    name: str | None = None
    arguments: str | None = None
    while True:
        key, position = _string(text, _expect(text, position, '"'))
        position = _skip(text, _expect(text, position, ":"))
        is_arguments = key in ("arguments", "parameters")
        if is_arguments and name is not None and _at(text, position) == "{":
            return _Head(name, position)
        value, end = _value(text, position)
        if key == "name":
            name = _known(value, names)
        if is_arguments:
            arguments = _as_text(value, text[position:end])
        separator = _at(text, _skip(text, end))
        position = _skip(text, end) + 1
        if separator == "}" and name is not None:
            return _Head(name, position, "{}" if arguments is None else arguments)
        if separator != ",":
            raise _NoCallError


def _known(value: object, names: Collection[str]) -> str:
    if not isinstance(value, str) or value not in names:
        raise _NoCallError
    return value


def _as_text(value: object, written: str) -> str:
    """Arguments are an object; some models write its text as a string, or null for none."""
    if value is None:
        return "{}"
    return value if isinstance(value, str) else written


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _WHITESPACE:
        position += 1
    return position


def _at(text: str, position: int) -> str:
    if position >= len(text):
        raise _IncompleteError
    return text[position]


def _expect(text: str, position: int, character: str) -> int:
    position = _skip(text, position)
    if _at(text, position) != character:
        raise _NoCallError
    return position + 1


def _string(text: str, position: int) -> tuple[str, int]:
    try:
        value, end = scanstring(text, position, True)
    except ValueError as error:
        raise _IncompleteError from error
    return str(value), int(end)


def _value(text: str, position: int) -> tuple[object, int]:
    """A whole value. A number is whole only when something comes behind it."""
    try:
        value, end = _DECODER.raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        raise _IncompleteError from error
    _at(text, end)
    return value, end


def _num_held(text: str) -> int:
    """Characters at the end that may be the beginning of a call."""
    for length in range(min(len(OPEN) - 1, len(text)), 0, -1):
        if text.endswith(OPEN[:length]):
            return length
    return 0
