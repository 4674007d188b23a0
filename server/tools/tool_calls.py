"""Calls of tools in the text of an answer, found while the text grows; here in the form of Hermes and ChatML models.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>

Around the calls is ordinary text. What only looks like a call (no such tool, no such form) stays text too. The
arguments of a call are handed on as they are written: whoever wants them to be valid JSON has the answer constrained.
The parts that come out do not depend on how the text was cut into pieces.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from server.tools.call_heads import WHITESPACE, IncompleteError, NoCallError, ObjectScanner, read_head

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_HEAD_CHARACTERS = 16_384
"""Before a call's name and the beginning of its arguments are known; what is longer is text."""


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


class CallPosition(Enum):
    TEXT = "text"
    HEAD = "head"
    """Behind `OPEN`, before the arguments."""
    ARGUMENTS = "arguments"
    TAIL = "tail"
    """Behind the arguments, up to the end of the call or the next one; what is there is left out."""


class CallParser:
    """Takes the text of one answer, in pieces; what all forms of calls have in common.

    Attributes:
        num_calls: how many calls have begun.
    """

    _opening = ""
    """What stood before the call that is being read, and is text if it turns out to be none."""

    def __init__(self, names: Collection[str]) -> None:
        """`names` are those of the tools that may be called."""
        self.num_calls = 0
        self._names = frozenset(names)
        self._place = CallPosition.TEXT
        self._buffer = ""
        self._held = ""
        self._follows_call = False
        self._scanner = ObjectScanner()
        self._object: ObjectScanner | None = None
        self._is_last = self._is_cut = False

    def push(self, text: str) -> list[Part]:
        """Takes more text; returns what is certain by now."""
        self._buffer += text
        return self._advance()

    def finish(self, *, is_cut: bool = False) -> list[Part]:
        """Takes the end of the text; returns what was held back.

        Args:
            is_cut: a limit ended the text: of a mark that has begun, nothing is text.
        """
        self._is_last, self._is_cut = True, is_cut
        return self._advance()

    def _advance(self) -> list[Part]:
        steps = {
            CallPosition.TEXT: self._text,
            CallPosition.HEAD: self._head,
            CallPosition.ARGUMENTS: self._arguments,
            CallPosition.TAIL: self._tail,
        }
        parts: list[Part] = []
        while steps[self._place](parts):
            pass
        return parts

    def _text(self, parts: list[Part]) -> bool:
        """Finds the beginning of a call; whether it did."""
        raise NotImplementedError

    def _tail(self, parts: list[Part]) -> bool:
        """Finds the end of a call; whether it did."""
        raise NotImplementedError

    def _release(self, parts: list[Part], num_held: int) -> bool:
        """Hands on text without a call, but for what may be the beginning of one."""
        is_kept = self._is_last and not (self._is_cut and num_held > 1)  # one character is rather text
        end = len(self._buffer) - (0 if is_kept else num_held)
        self._emit(parts, self._buffer[:end])
        self._buffer = self._buffer[end:]
        if self._is_last and self._held and not self.num_calls:
            parts.append(TextPart(self._held))
            self._held = ""
        return False

    def _emit(self, parts: list[Part], text: str) -> None:
        """Text, but for the white space around calls: what may turn out to be that is held back."""
        if self._follows_call:
            text = text.lstrip(WHITESPACE)
            self._follows_call = not text
        visible = text.rstrip(WHITESPACE)
        if visible:
            parts.append(TextPart(self._held + visible))
            self._held = ""
        self._held += text[len(visible) :]

    def _head(self, parts: list[Part]) -> bool:
        try:
            head = read_head(self._buffer[:MAX_HEAD_CHARACTERS], self._names)
        except IncompleteError:
            is_cut = self._is_cut and bool(self._opening)
            if (is_cut or not self._is_last) and len(self._buffer) < MAX_HEAD_CHARACTERS:
                return False
            return self._no_call(parts)
        except NoCallError:
            return self._no_call(parts)
        self._held, self._follows_call = "", True
        parts.append(CallPart(self.num_calls, head.name))
        self.num_calls += 1
        self._buffer = self._buffer[head.position :]
        self._scanner, self._object = ObjectScanner(), ObjectScanner(depth=1)
        self._place = CallPosition.ARGUMENTS
        if head.arguments is not None:
            parts.append(ArgumentsPart(self.num_calls - 1, head.arguments))
            self._object = None
            self._place = CallPosition.TAIL
        return True

    def _no_call(self, parts: list[Part]) -> bool:
        self._emit(parts, self._opening)
        self._place = CallPosition.TEXT
        return True

    def _arguments(self, parts: list[Part]) -> bool:
        length = self._scanner.feed(self._buffer)
        if length:
            parts.append(ArgumentsPart(self.num_calls - 1, self._buffer[:length]))
            self._buffer = self._buffer[length:]
        if self._scanner.is_done:
            self._place = CallPosition.TAIL
        return self._scanner.is_done

    def _object_ended(self) -> bool:
        """Drops what is left of the call's object; whether its end was there."""
        if self._object is not None:
            self._buffer = self._buffer[self._object.feed(self._buffer) :]
            if not self._object.is_done:
                return False
            self._object = None
        return True


class ToolCallParser(CallParser):
    """Calls in the form of Hermes and ChatML models."""

    _opening = OPEN

    def _text(self, parts: list[Part]) -> bool:
        begin = self._buffer.find(OPEN)
        if begin < 0:
            return self._release(parts, num_held(self._buffer, OPEN))
        self._emit(parts, self._buffer[:begin])
        self._buffer = self._buffer[begin + len(OPEN) :]
        self._place = CallPosition.HEAD
        return True

    def _tail(self, parts: list[Part]) -> bool:
        close, following = self._buffer.find(CLOSE), self._buffer.find(OPEN)
        if close >= 0 and not 0 <= following < close:
            self._buffer = self._buffer[close + len(CLOSE) :]
        elif following >= 0:
            self._buffer = self._buffer[following:]
        else:
            self._buffer = self._buffer[-len(CLOSE) :]
            return False
        self._place = CallPosition.TEXT
        return True


def num_held(text: str, mark: str) -> int:
    """Characters at the end of a text that may be the beginning of a mark."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
