"""`bad_words` as tokens: as the field understands it, each word at the beginning of an answer and behind a space."""

from collections.abc import Sequence

from server.text.tokenizer import Tokenizer


def bad_word_tokens(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The spellings of the words, each once. A word can still come about in other tokens than the tokenizer's own."""
    spellings: dict[tuple[int, ...], None] = {}
    for word in words:
        plain = tuple(tokenizer.encode_plain(word, continues=True))
        spellings[plain] = None
        spaced = tuple(tokenizer.encode_plain(f" {word.lstrip(' ')}", continues=True))
        if len(spaced) == len(plain) and spaced[:1] != plain[:1]:  # longer: a space, and then the word as it is
            spellings[spaced] = None
    return tuple(spelling for spelling in spellings if spelling)
