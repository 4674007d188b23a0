"""The tokenizer of a model folder: `tokenizer.json` and its configuration, read with the `tokenizers` library.

A model without a tokenizer is served too: it takes token ids and answers with token ids.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import tokenizers

from dijiang_model.text.folder import TokenizerFiles, UnsupportedTokenizerError, read_tokenizer_files
from dijiang_model.text.vocabulary import Vocabulary, build_vocabulary

SHORT_CHARACTERS = 4096
"""A text up to here is encoded in less time than a batch of one takes to set up."""


class _Encoding(Protocol):
    ids: list[int]
    offsets: list[tuple[int, int]]


class _AddedToken(Protocol):
    content: str
    special: bool


class _RawTokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` (which has no type hints) that is used here."""

    encode_special_tokens: bool

    def encode(self, sequence: str, add_special_tokens: bool = True) -> _Encoding: ...
    def encode_batch(self, input: list[str], add_special_tokens: bool = True) -> list[_Encoding]: ...
    def encode_batch_fast(self, input: list[str], add_special_tokens: bool = True) -> list[_Encoding]: ...
    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]: ...
    def get_added_tokens_decoder(self) -> dict[int, _AddedToken]: ...
    def id_to_token(self, id: int) -> str | None: ...
    def to_str(self, pretty: bool = False) -> str: ...
    def no_truncation(self) -> None: ...
    def no_padding(self) -> None: ...


class Tokenizer:
    """Text to token ids, and the vocabulary for the way back.

    Attributes:
        vocabulary: bytes of every token.
        special_tokens: name (`bos_token`, ...) -> literal text.
        chat_template: Jinja source or None.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        """Raises `UnsupportedTokenizerError` when `tokenizer.json` cannot be used."""
        raw = _parse(files.tokenizer_json)
        raw.no_truncation()
        raw.no_padding()
        self._raw = raw
        self._plain = _parse(files.tokenizer_json)
        self._plain.no_truncation()
        self._plain.no_padding()
        self._plain.encode_special_tokens = True
        added = {token_id: (token.content, token.special) for token_id, token in raw.get_added_tokens_decoder().items()}
        self.vocabulary: Vocabulary = build_vocabulary(raw.get_vocab(True), added, json.loads(raw.to_str())["decoder"])
        self.special_tokens = files.special_tokens
        self.chat_template = files.chat_template
        self.tokenizer_class = files.tokenizer_class
        self._special_ids = {text: token_id for token_id, (text, special) in added.items() if special and text}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @property
    def vocab_size(self) -> int:
        """Number of ids up to the largest one known."""
        return len(self.vocabulary.token_bytes)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encodes text in which special tokens are recognised where they are written."""
        return _ids(self._raw, text, add_special_tokens=add_special_tokens)

    def find_special_tokens(self, text: str) -> list[tuple[int, int]]:
        """Begin and end of each special token that is written in `text`, from left to right."""
        if self._special_pattern is None:
            return []
        return [match.span() for match in self._special_pattern.finditer(text)]

    def special_token_id(self, text: str) -> int:
        """Id of a special token by its literal text (`KeyError` if there is none)."""
        return self._special_ids[text]

    def encode_plain(self, text: str, *, continues: bool) -> list[int]:
        """Encodes text in which special tokens are only text.

        Args:
            continues: something comes before, so the space that some tokenizers put before a whole
                text must not be added.
        """
        if not text:
            return []
        if not (continues and self.vocabulary.num_leading_spaces):
            return _ids(self._plain, text, add_special_tokens=False)
        (encoding,) = self._plain.encode_batch(["\n" + text], add_special_tokens=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return [token_id for token_id, (_, end) in pairs if end > 1]

    def piece(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty if unknown."""
        piece = self._raw.id_to_token(token_id)
        return piece if piece is not None else ""

    def is_all_special(self, token_ids: Sequence[int]) -> bool:
        """Whether nothing in `token_ids` is text."""
        special_ids = self.vocabulary.special_ids
        return all(token_id in special_ids for token_id in token_ids)


def _ids(raw: _RawTokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids. Of a batch the library lets go of the interpreter lock, so that everybody else goes on meanwhile."""
    if len(text) <= SHORT_CHARACTERS:
        return raw.encode(text, add_special_tokens=add_special_tokens).ids
    return raw.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Reads the tokenizer of a model folder; None if it has none.

    Raises:
        UnsupportedTokenizerError: a file is damaged or uses something that is not supported.
    """
    files = read_tokenizer_files(folder)
    return None if files is None else Tokenizer(files)


def _parse(tokenizer_json: str) -> _RawTokenizer:
    try:
        return cast(_RawTokenizer, tokenizers.Tokenizer.from_str(tokenizer_json))
    except Exception as error:  # the library raises plain Exception
        raise UnsupportedTokenizerError(f"tokenizer.json cannot be read: {error}") from error
