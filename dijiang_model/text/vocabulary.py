"""What each token id means as bytes of UTF-8 text.

Generated text is the concatenation of its tokens' bytes, decoded once; so an incremental decoder needs
constant time per token and never looks back. The bytes follow from the tokenizer's own decoder:
byte-level alphabets (GPT-2, NeoX, Llama 3) and SentencePiece pieces with byte fallback (LLaMA).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dijiang_model.text.folder import UnsupportedTokenizerError

PieceDecoder = Callable[[str], bytes]
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids as bytes.

    Attributes:
        token_bytes: index is the token id; ids that the tokenizer does not know are empty.
        special_ids: tokens such as `<|im_end|>` that are not part of the text.
        num_leading_spaces: spaces which the tokenizer puts before a whole text, and which are taken
            away again where a text begins with generated tokens.
    """

    token_bytes: tuple[bytes, ...]
    special_ids: frozenset[int]
    num_leading_spaces: int = 0

    def bytes_of(self, token_id: int) -> bytes:
        """Bytes of one token; empty for an id outside the tokenizer (padding rows of an embedding)."""
        return self.token_bytes[token_id] if 0 <= token_id < len(self.token_bytes) else b""


def build_vocabulary(
    pieces: Mapping[str, int], added: Mapping[int, tuple[str, bool]], decoder: Mapping[str, Any] | None
) -> Vocabulary:
    """Builds the table once, at start.

    Args:
        pieces: token -> id, all of them.
        added: id -> (literal text, is special) of the added tokens.
        decoder: the `decoder` object of `tokenizer.json`.

    Raises:
        UnsupportedTokenizerError: the decoder has a step unknown here.
    """
    decode_piece, num_leading_spaces = _piece_decoder(decoder)
    table = [b""] * (max([*pieces.values(), *added, -1]) + 1)
    for piece, token_id in pieces.items():
        table[token_id] = decode_piece(piece)
    for token_id, (content, _) in added.items():
        table[token_id] = content.encode("utf-8", "replace")
    special_ids = frozenset(token_id for token_id, (_, special) in added.items() if special)
    return Vocabulary(tuple(table), special_ids, num_leading_spaces)


def _piece_decoder(decoder: Mapping[str, Any] | None) -> tuple[PieceDecoder, int]:
    if decoder is None:  # the tokenizers library then joins the pieces with spaces
        return (lambda piece: b" " + piece.encode()), 1
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if any(step["type"] == "ByteLevel" for step in steps):
        return _byte_level_piece, 0
    return _sentencepiece(steps)


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level vocabularies (GPT-2's table), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def _byte_level_piece(piece: str) -> bytes:
    try:
        return bytes([BYTE_ALPHABET[character] for character in piece])
    except KeyError:
        return piece.encode("utf-8", "replace")


def _sentencepiece(steps: list[Mapping[str, Any]]) -> tuple[PieceDecoder, int]:
    replacements: list[tuple[str, str]] = []
    byte_fallback = False
    num_leading_spaces = 0
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
                replacements.append((pattern, content))
            case {"type": "Metaspace", "replacement": str(pattern)}:
                replacements.append((pattern, " "))
                num_leading_spaces += 0 if step.get("prepend_scheme") == "never" else 1
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                num_leading_spaces += start
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case _:
                raise UnsupportedTokenizerError(
                    f"the tokenizer's decoder step {step.get('type')!r} is not supported; "
                    "supported are ByteLevel, Metaspace, Replace, ByteFallback, Fuse and Strip"
                )

    def decode_piece(piece: str) -> bytes:
        if byte_fallback and (match := BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        for pattern, content in replacements:
            piece = piece.replace(pattern, content)
        return piece.encode("utf-8", "replace")

    return decode_piece, num_leading_spaces
