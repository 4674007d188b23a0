"""Tokens that a request itself rules out, for whole answers or after certain tokens. Standard library only."""

from array import array

from server.engine.sequence import Chunk


def bad_continuations(chunk: Chunk) -> tuple[int, ...]:
    """Last tokens of the bad words whose other tokens the output, drafts included, ends with."""
    words = chunk.sequence.sampling.bad_words
    if not words:
        return ()
    outputs = chunk.sequence.outputs
    last = (*outputs[max(0, len(outputs) + 1 - max(map(len, words))) :], *chunk.drafts)
    return tuple(word[-1] for word in words if len(word) == 1 or last[1 - len(word) :] == word[:-1])


def permit_only(words: "array[int]", start: int, *, num_words: int, token_ids: tuple[int, ...]) -> None:
    """Clears the bits of all other tokens in `num_words` 8-byte words from words[start] on, a bit for each token."""
    permitted = bytearray(8 * num_words)
    for token_id in token_ids:
        permitted[token_id // 8] |= 1 << token_id % 8
    for number, word in enumerate(array("q", bytes(permitted))):
        words[start + number] &= word
