"""Grammars over a model's vocabulary: which tokens may come next so that the text stays in a language.

The only caller of llguidance, which is imported with the first grammar: an engine runs without it too. A grammar
is Lark text that the service has compiled once before, within limits of time and memory and in a process of its own;
the limits on a single step hold here too. Tokens are their bytes as `dijiang_model.text.vocabulary` gives them, so what
a grammar permits is exactly what a client reads.
"""

import json
import re
import time
from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dijiang_model.text.folder import UnsupportedTokenizerError
from dijiang_model.text.vocabulary import Vocabulary, build_vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

HEADER = '%llguidance {"no_forcing": true}\n'
"""First line of every grammar. Otherwise text that leaves no choice is looked for ahead and tokenized at each step,
which takes seconds for some grammars; and the model is better asked how it spells its words."""

_MAX_LEXER_STATES = 50_000
_MAX_GRAMMAR_SIZE = 200_000
_STEP_LEXER_FUEL = 200_000
_STEP_MAX_ITEMS = 50_000
_PROBED_TOKENS = 8
_ALLOWED_S, _ALLOWED_S_PER_TOKEN = 1.0, 0.005
"""Processor time of one answer. A grammar with many ways to read a text costs more with every token, within all the
limits above: `start: "a"* start | "a"` takes half a second for one token after 400, and everybody waits for it."""


class GrammarError(ValueError):
    """A grammar that cannot be used; the text is for the client who sent it."""


class GrammarCompiler:
    """Makes matchers for one vocabulary."""

    def __init__(self, vocabulary: Vocabulary, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """
        Args:
            vocabulary: bytes of the tokens.
            vocab_size: width of the model's logits; ids that the vocabulary lacks are never permitted.
            eos_token_ids: at least one; permitted where a text is complete.

        Raises:
            GrammarError: the model has no end-of-sequence token.
        """
        from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper

        if not eos_token_ids:
            raise GrammarError("this model has no end-of-sequence token, so no structured output could ever end")
        tokens = _Tokens(vocabulary, vocab_size, eos_token_ids)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._num_mask_bytes = (vocab_size + 31) // 32 * 4
        self._tokenizer = LLTokenizer(TokenizerWrapper(tokens), n_vocab=vocab_size, eos_token=[*eos_token_ids])
        self._limits = LLParserLimits(
            max_lexer_states=_MAX_LEXER_STATES,
            max_grammar_size=_MAX_GRAMMAR_SIZE,
            step_lexer_fuel=_STEP_LEXER_FUEL,
            step_max_items=_STEP_MAX_ITEMS,
            verbose_errors=False,
        )

    @classmethod
    def load(cls, folder: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> "GrammarCompiler":
        """For the tokenizer of a model folder.

        Raises:
            GrammarError: there is none, or it is of an unsupported kind.
        """
        try:
            vocabulary = read_vocabulary(folder / "tokenizer.json")
        except (OSError, UnsupportedTokenizerError) as error:
            raise GrammarError("this model has no tokenizer that structured output can be built on") from error
        return cls(vocabulary, vocab_size=vocab_size, eos_token_ids=eos_token_ids)

    def compile(self, text: str) -> "LLMatcher":
        """A matcher at its beginning; copies of it are cheap.

        Args:
            text: a grammar in llguidance's Lark dialect, `HEADER` first.

        Raises:
            GrammarError: it is not valid, over a limit, or permits no text.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(text), log_level=0, limits=self._limits)
        error = matcher.get_error() if matcher.is_error() else self._probe(matcher.deep_copy())
        if error:
            raise GrammarError(_readable(error))
        return matcher

    def _probe(self, matcher: "LLMatcher") -> str:
        """What is wrong with the first steps of an answer, if anything is.

        The first mask is the most expensive one, and shows grammars that permit nothing; a rule of thousands of ways
        is over the limit of a step only behind the first token.
        """
        ends = sum(1 << token_id for token_id in self._eos_token_ids)
        num_taken = 0
        while num_taken < _PROBED_TOKENS:
            permitted = int.from_bytes(matcher.compute_bitmask(), "little") & ~ends
            if matcher.is_error() or not permitted:
                break
            if not matcher.consume_token((permitted & -permitted).bit_length() - 1):
                break
            num_taken += 1
        error = matcher.get_error()
        # Behind a token taken at random there may be no other; that says nothing of the grammar.
        return "" if num_taken > 0 and error.startswith("NoExtension") else error

    def constraint(self, matcher: "LLMatcher") -> "GrammarConstraint":
        """One sequence's own, from a matcher of `compile`, which stays at its beginning."""
        return GrammarConstraint(
            matcher.deep_copy(), eos_token_ids=self._eos_token_ids, num_mask_bytes=self._num_mask_bytes
        )


class GrammarConstraint:
    """A matcher that follows the tokens of one sequence.

    Attributes:
        has_ended: the end-of-sequence token was accepted.
    """

    def __init__(self, matcher: "LLMatcher", *, eos_token_ids: frozenset[int], num_mask_bytes: int) -> None:
        self._matcher = matcher
        self._eos_token_ids = eos_token_ids
        self._num_mask_bytes = num_mask_bytes
        self._left_s = _ALLOWED_S
        self.has_ended = False

    def accept(self, token_id: int) -> str | None:
        """Takes a sampled token in; says what is wrong if the grammar cannot go on with it, or has cost too much."""
        with self._paid():
            is_accepted = self._matcher.consume_token(token_id)
        if not is_accepted:
            return _readable(self._matcher.get_error())
        self.has_ended = token_id in self._eos_token_ids
        self._left_s += _ALLOWED_S_PER_TOKEN
        if self._left_s < 0 and not self.has_ended:
            return "it is too complex: its steps take too long"
        return None

    def num_permitted(self, token_ids: tuple[int, ...]) -> int:
        """How many of these tokens may come next, one after the other; accepts none of them."""
        with self._paid():
            return 0 if self._matcher.is_error() else self._matcher.validate_tokens([*token_ids])

    def write_mask(self, words: "array[int]", start: int, *, after: tuple[int, ...] = ()) -> None:
        """Writes the bits of the permitted tokens, lowest first, into 8-byte words from words[start] on.

        Writes nothing if the grammar has become too complex; `accept` of whatever comes then says so.

        Args:
            words: enough of them behind `start`.
            start: index of the first word.
            after: permitted tokens that are taken to come before, and are not accepted by this.
        """
        assert words.itemsize == 8
        assert 8 * start + self._num_mask_bytes <= 8 * len(words)
        matcher = self._matcher
        with self._paid():
            if after and not matcher.is_error():
                matcher = matcher.deep_copy()  # not rolled back: too complex a step would stay an error
                matcher.consume_tokens([*after])
            if not matcher.is_error():
                address, _ = words.buffer_info()
                matcher.unsafe_compute_mask_ptr(address + 8 * start, self._num_mask_bytes)

    @contextmanager
    def _paid(self) -> Iterator[None]:
        """Takes the CPU time of what is done within off what this answer has left."""
        begin = time.thread_time()  # of this thread alone: nobody pays for a machine that is busy
        try:
            yield
        finally:
            self._left_s -= time.thread_time() - begin


def read_vocabulary(tokenizer_json: Path) -> Vocabulary:
    """Bytes of the tokens of a `tokenizer.json`, read without the library that wrote it.

    Raises:
        OSError: there is no such file.
        UnsupportedTokenizerError: it is not understood.
    """
    try:
        content = json.loads(tokenizer_json.read_text(encoding="utf-8"))
        table = content["model"]["vocab"]
        if isinstance(table, list):  # Unigram: pairs of piece and score
            table = {piece: token_id for token_id, (piece, _) in enumerate(table)}
        added = {token["id"]: (token["content"], bool(token["special"])) for token in content["added_tokens"]}
        pieces = {**table, **{text: token_id for token_id, (text, _) in added.items()}}
        return build_vocabulary(pieces, added, content["decoder"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UnsupportedTokenizerError):
            raise
        raise UnsupportedTokenizerError(f"tokenizer.json is not understood: {error}") from error


class _Tokens:
    """A vocabulary in the shape that llguidance asks for."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, eos_token_ids: Items[int]) -> None:
        known = vocabulary.token_bytes[:vocab_size]
        self.tokens = [*known, *(b"" for _ in range(vocab_size - len(known)))]
        special = vocabulary.special_ids | frozenset(eos_token_ids)
        self.special_token_ids = sorted(token_id for token_id in special if token_id < vocab_size)
        self.eos_token_id = eos_token_ids[0]

    def __call__(self, text: bytes) -> list[int]:
        """Never needed, for nothing is forced; llguidance asks once whether bytes may come."""
        return []


def _readable(error: str) -> str:
    """llguidance's message without the grammar that it repeats."""
    lines = [line.strip() for line in error.splitlines()]
    shown = " ".join(line for line in lines if line.strip("^ ") and not _REPEATED.match(line))
    shown = _PREFIX.sub("", shown)
    if shown.startswith("regex parse error:"):
        shown = shown.rpartition("error: ")[2]
    if position := _POSITION.match(shown):
        shown = f"line {int(position[1]) - 1}, column {position[2]}: {shown[position.end() :]}"  # HEADER is line 1
    return _EXPLANATIONS.get(shown, shown)[:300]


_REPEATED = re.compile(r"\d+ \||<non-verbose/>")
_PREFIX = re.compile(r'^at \d+\(\d+\): (failed to compile JSON schema: |invalid regex ".*" \(in regex\): )')
_POSITION = re.compile(r"^(?:at )?(\d+)\((\d+)\): ")
_EXPLANATIONS = {
    "NoExtensionBias": "it permits no text at all",
    "NoExtension": "it permits no text at all",
    "ParserTooComplex": "it is too complex: too many ways to read a text",
    "LexerTooComplex": "it is too complex: a pattern has too many states",
}
