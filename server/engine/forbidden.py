"""Tokens that a request itself rules out, for whole answers or after certain tokens. Standard library only."""

from array import array

from server.engine.sequence import Sequence


def bad_continuations(sequence: Sequence) -> tuple[int, ...]:
    """Last tokens of the bad words whose other tokens the output ends with."""
    words = sequence.sampling.bad_words
    if not words:
        return ()
    outputs = sequence.outputs
    return tuple(word[-1] for word in words if len(word) == 1 or tuple(outputs[1 - len(word) :]) == word[:-1])


def permit_only(words: "array[int]", start: int, *, num_words: int, token_ids: tuple[int, ...]) -> None:
    """Clears the bits of all other tokens in `num_words` 8-byte words from words[start] on, a bit for each token."""
    permitted = bytearray(8 * num_words)
    for token_id in token_ids:
        permitted[token_id // 8] |= 1 << token_id % 8
    for number, word in enumerate(array("q", bytes(permitted))):
        words[start + number] &= word
