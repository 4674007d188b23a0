"""What a model thinks before it answers: the text between `<think>` and `</think>`, found while the text grows.

A thought stands at the beginning of an answer or nowhere: further on, the marks are text like any other. White space
around a thought, and before the text behind it, belongs to neither. The parts that come out, put together, do not
depend on how the text was cut into pieces; what may be the beginning of a mark is held back until that is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from dijiang_model.text.vocabulary import Vocabulary
from server.text.stream import TextStream
from server.text.tokenizer import Tokenizer
from server.tools.call_heads import WHITESPACE
from server.tools.tool_calls import CallParser, Part, TextPart, num_held

OPEN, CLOSE = "<think>", "</think>"
_MAX_TAIL_TOKENS = 64
"""Of a prompt that may open a thought: the mark in single bytes, and white space behind it."""


class ThoughtStart(Enum):
    """What the prompt says about the thought of its answer."""

    FREE = auto()
    """Nothing: the answer may begin with one."""
    OPENED = auto()
    """The answer begins inside one."""
    CLOSED = auto()
    """There is none."""


@dataclass(frozen=True, slots=True)
class ThoughtPart:
    """The next piece of a thought."""

    text: str


AnswerPart = ThoughtPart | Part


@dataclass(frozen=True, slots=True)
class ThoughtForm:
    """That a model thinks, and with which tokens.

    Attributes:
        token_ids: of the marks, where they are special tokens; they are text, then.
    """

    token_ids: frozenset[int] = frozenset()

    @property
    def is_special(self) -> bool:
        """Whether the marks are special tokens."""
        return bool(self.token_ids)


@dataclass(frozen=True, slots=True)
class Thinking:
    """How the answers to one prompt begin."""

    form: ThoughtForm
    begin: ThoughtStart


class ThoughtSplitter:
    """Takes the text of one answer, in pieces.

    Attributes:
        is_thinking: what comes next belongs to the thought, or to its marks.
    """

    def __init__(self, begin: ThoughtStart) -> None:
        self.is_thinking = begin is ThoughtStart.OPENED
        self._is_undecided = begin is not ThoughtStart.CLOSED
        self._follows_mark = False
        self._buffer = ""

    def push(self, text: str, *, is_last: bool = False) -> list[ThoughtPart | TextPart]:
        """Takes more text; returns what is certain by now. With `is_last`: everything that was held back, too."""
        self._buffer += text
        if self._is_undecided and not self._decide(is_last):
            return []
        parts: list[ThoughtPart | TextPart] = []
        if self.is_thinking:
            self._think(parts, is_last)
        if not self.is_thinking:
            self._answer(parts)
        return parts

    def _decide(self, is_last: bool) -> bool:
        """Whether it is known by now what the answer begins with."""
        seen = self._buffer.lstrip(WHITESPACE)
        if not is_last and seen != OPEN and OPEN.startswith(seen):
            return False
        if seen.startswith(OPEN):  # also where the prompt has opened it: models repeat the mark
            self._buffer = seen[len(OPEN) :]
            self.is_thinking = True
        self._follows_mark = self.is_thinking
        self._is_undecided = False
        return True

    def _think(self, parts: list[ThoughtPart | TextPart], is_last: bool) -> None:
        end = self._buffer.find(CLOSE)
        thought = self._buffer[: end if end >= 0 else len(self._buffer) - num_held(self._buffer, CLOSE)]
        if end < 0 and is_last:
            thought = self._buffer
        visible = thought.rstrip(WHITESPACE)
        self._emit(parts, visible, ThoughtPart)
        self._buffer = self._buffer[len(visible) :]
        if end >= 0:
            self._buffer = self._buffer[end + len(CLOSE) - len(visible) :]
            self.is_thinking, self._follows_mark = False, True

    def _answer(self, parts: list[ThoughtPart | TextPart]) -> None:
        text, self._buffer = self._buffer, ""
        self._emit(parts, text, TextPart)

    def _emit(self, parts: list[ThoughtPart | TextPart], text: str, kind: type[ThoughtPart] | type[TextPart]) -> None:
        """Text, but for the white space behind a mark."""
        if self._follows_mark:
            text = text.lstrip(WHITESPACE)
            self._follows_mark = not text
        if text:
            parts.append(kind(text))


class AnswerParser:
    """Takes the text of one answer apart: what was thought, what is said, what is called."""

    def __init__(self, begin: ThoughtStart | None, calls: CallParser | None, *, is_forced: bool = False) -> None:
        """
        Args:
            begin: what the prompt says about a thought; None: the model does not think.
            calls: finds calls of tools in what is said; None: nothing may be called.
            is_forced: whether the answer is calls and nothing else, so that other text is a call that was cut off.
        """
        self.is_forced = is_forced
        self._splitter = None if begin is None else ThoughtSplitter(begin)
        self._calls = calls

    @property
    def is_plain(self) -> bool:
        """Whether there can be nothing but text."""
        return self._splitter is None and self._calls is None

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return 0 if self._calls is None else self._calls.num_calls

    def push(self, text: str, *, is_last: bool, is_cut: bool = False) -> list[AnswerPart]:
        """Takes more text; returns what is certain by now.

        Args:
            is_last: return everything that was held back, too.
            is_cut: with `is_last`: a limit ended the answer.
        """
        split: list[ThoughtPart | TextPart] = [TextPart(text)] if text else []
        if self._splitter is not None:
            split = self._splitter.push(text, is_last=is_last)
        if self._calls is None:
            return [*split]
        parts: list[AnswerPart] = []
        for part in split:
            parts.extend([part] if isinstance(part, ThoughtPart) else self._calls.push(part.text))
        if is_last:
            parts.extend(self._calls.finish(is_cut=is_cut))
        return [part for part in parts if not isinstance(part, TextPart)] if self.is_forced else parts


class ThoughtCounter:
    """Counts the tokens of one answer that went into its thought, the marks included.

    Attributes:
        num_tokens: up to the token that completes the closing mark; all of them while there is none.
    """

    def __init__(self, thinking: Thinking, vocabulary: Vocabulary) -> None:
        self.num_tokens = 0
        self._num_seen = 0
        self._stream: TextStream | None = None
        self._splitter = ThoughtSplitter(thinking.begin)
        if thinking.begin is not ThoughtStart.CLOSED:
            self._stream = TextStream(vocabulary, shown=thinking.form.token_ids)

    def take(self, token_ids: Sequence[int]) -> None:
        """Takes the next tokens."""
        for token_id in token_ids if self._stream is not None else ():
            self._take(token_id)

    def _take(self, token_id: int) -> None:
        if self._stream is None:
            return
        self._num_seen += 1
        was_thinking = self._splitter.is_thinking
        parts = self._splitter.push(self._stream.push(token_id))
        if was_thinking or self._splitter.is_thinking or any(isinstance(part, ThoughtPart) for part in parts):
            self.num_tokens = self._num_seen
        if (was_thinking and not self._splitter.is_thinking) or any(isinstance(part, TextPart) for part in parts):
            self._stream = None  # the thought is over, or there was none


def thought_form(wanted: str, tokenizer: Tokenizer | None) -> ThoughtForm | None:
    """Whether and how a model thinks.

    Args:
        wanted: `think` or `none`; `auto`: as its chat template, or else its vocabulary, has the marks.
    """
    if tokenizer is None or wanted == "none":
        return None
    marks = (OPEN, CLOSE)
    template = "" if tokenizer.chat_template is None else tokenizer.chat_template
    if wanted == "auto" and not all(mark in template or _is_token(mark, tokenizer) for mark in marks):
        return None
    are_special = all(tokenizer.find_special_tokens(mark) == [(0, len(mark))] for mark in marks)
    return ThoughtForm(frozenset(map(tokenizer.special_token_id, marks)) if are_special else frozenset())


def _is_token(mark: str, tokenizer: Tokenizer) -> bool:
    *_, last = tokenizer.encode(mark, add_special_tokens=False)
    return tokenizer.vocabulary.bytes_of(last) == mark.encode()


def begin_of(prompt: Sequence[int], tokenizer: Tokenizer, *, continued: str = "") -> ThoughtStart:
    """What a rendered prompt says about the thought of its answer.

    Args:
        prompt: its tokens.
        continued: the beginning of the answer that is gone on with, if there is one.
    """
    if continued.strip():
        return ThoughtStart.OPENED if continued.rfind(OPEN) > continued.rfind(CLOSE) else ThoughtStart.CLOSED
    # Only at the very end, where no message can put it: templates write something behind each.
    tail = b"".join(map(tokenizer.vocabulary.bytes_of, prompt[-_MAX_TAIL_TOKENS:])).rstrip()
    if tail.endswith(OPEN.encode()):
        return ThoughtStart.OPENED
    return ThoughtStart.CLOSED if tail.endswith(CLOSE.encode()) else ThoughtStart.FREE
