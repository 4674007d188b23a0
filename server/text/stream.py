"""Tokens in, text out, one at a time: no half characters, no half stop strings.

The contract, for any split of any text: the concatenation of what `push` and `finish` return is
`bytes.decode("utf-8", "replace")` of all token bytes, up to the first stop string, without an
incomplete character at the very end. The first stop string is the one that is completed first; of
several completed by the same character, the longest.
"""

import codecs
from collections.abc import Sequence

from dijiang_model.text.vocabulary import Vocabulary


class TextStream:
    """The text of one answer while it grows. Amortised constant time per token.

    Attributes:
        stopped: a stop string was found; all further tokens are ignored.
        found: which one; empty if there was none.
        num_tokens: tokens pushed until then, the stopping one included.
        num_characters: characters that were complete by then, those held back and of a stop string included.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        min_tokens: int = 0,
        at_start: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """
        Args:
            stop: non-empty strings that end the text.
            include_stop: whether the stop string found is part of the text.
            skip_special: leave out special tokens.
            min_tokens: stop strings are not looked for in the text of that many first tokens.
            at_start: nothing but special tokens comes before, so the space that the tokenizer
                puts before a text is taken away.
            shown: special tokens that are not left out.
        """
        self.stopped = False
        self.found = ""
        self.num_tokens = 0
        self.num_characters = 0
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = StopMatcher(stop, include_stop=include_stop) if stop else None
        self._skipped = vocabulary.special_ids - shown if skip_special else frozenset()
        self._min_tokens = min_tokens
        self._spaces_to_strip = vocabulary.num_leading_spaces if at_start else 0

    def push(self, token_id: int) -> str:
        """Takes one token; returns the text that is certain by now, often empty."""
        if self.stopped:
            return ""
        self.num_tokens += 1
        if token_id in self._skipped:
            return ""
        text = self._decoder.decode(self._vocabulary.bytes_of(token_id))
        if self._spaces_to_strip and text:
            text = self._strip(text)
        self.num_characters += len(text)
        if self._matcher is None or self.num_tokens <= self._min_tokens:
            return text
        released = self._matcher.feed(text)
        self.stopped, self.found = self._matcher.matched, self._matcher.found
        return released

    def finish(self, *, is_whole: bool = False) -> str:
        """Returns what was held back: a beginning of a stop string that never came.

        Args:
            is_whole: all tokens of a text were given, so that a character that is not complete is written as U+FFFD.
        """
        held = "" if self._matcher is None else self._matcher.flush()
        return held + self._decoder.decode(b"", True) if is_whole else held

    def _strip(self, text: str) -> str:
        stripped = text[: self._spaces_to_strip].lstrip(" ") + text[self._spaces_to_strip :]
        self._spaces_to_strip = 0 if stripped else self._spaces_to_strip - len(text)
        return stripped


class StopMatcher:
    """Finds the first of some strings in a growing text, character by character (Knuth-Morris-Pratt)."""

    def __init__(self, stop: Sequence[str], *, include_stop: bool = False) -> None:
        # Longest first, so that of several completed by one character the longest is taken.
        self._stop = sorted(stop, key=len, reverse=True)
        self._borders = [_borders(pattern) for pattern in self._stop]
        self._progress = [0] * len(self._stop)
        self._include_stop = include_stop
        self._held = ""
        self.matched = False
        self.found = ""

    def feed(self, text: str) -> str:
        """Returns the part of the text so far that cannot belong to a stop string."""
        if self.matched:
            return ""
        begin = len(self._held)
        self._held += text
        for position in range(begin, len(self._held)):
            length = self._advance(self._held[position])
            if length is not None:
                self.matched = True
                end = position + 1
                self.found = self._held[end - length : end]
                return self._release(end if self._include_stop else end - length)
        return self._release(len(self._held) - max(self._progress))

    def flush(self) -> str:
        """Returns what is held back; nothing if a stop string was found."""
        return "" if self.matched else self._release(len(self._held))

    def _release(self, end: int) -> str:
        released, self._held = self._held[:end], self._held[end:]
        return released

    def _advance(self, character: str) -> int | None:
        """Feeds one character to every pattern; the length of the longest one completed by it."""
        completed: int | None = None
        for index, pattern in enumerate(self._stop):
            progress, borders = self._progress[index], self._borders[index]
            while progress and pattern[progress] != character:
                progress = borders[progress - 1]
            progress += pattern[progress] == character
            if progress == len(pattern):
                completed = completed if completed is not None else progress
                progress = borders[progress - 1]
            self._progress[index] = progress
        return completed


def _borders(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for position in range(1, len(pattern)):
        while length and pattern[position] != pattern[length]:
            length = borders[length - 1]
        length += pattern[position] == pattern[length]
        borders[position] = length
    return borders
