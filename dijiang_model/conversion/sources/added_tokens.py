"""Tokens that only the settings beside `tokenizer.json` name, put into it, as transformers does when it loads a folder.

Trainers that add tokens often leave `tokenizer.json` as it was and write them into `added_tokens_decoder` of
`tokenizer_config.json`; without them such a token would be encoded letter by letter.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dijiang_model.errors import ConfigError, ConversionError
from dijiang_model.formats.json_fields import read_json_object
from dijiang_model.formats.problem_list import problem_list
from dijiang_model.text.folder import MAP_FILE, SETTINGS_FILE, token_text

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

ADDED_FILE = "added_tokens.json"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTED = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def complete_tokenizer(file: Path, *, vocab_size: int) -> None:
    """Adds to a `tokenizer.json` the tokens that the files beside it name; left as it is where nothing is missing.

    Args:
        file: the `tokenizer.json`.
        vocab_size: of the model. A token that is named but has no id gets one only below it.

    Raises:
        ConversionError: a file is damaged, or a token has two ids.
    """
    from tokenizers import Tokenizer  # kept out of the engine's imports

    settings, named = _settings(file.parent)
    tokenizer = Tokenizer.from_file(str(file))
    stated = _stated(file.parent, settings, named)
    before = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([token for _, token in sorted(stated.items()) if repr(token) not in before])
    _add_named(tokenizer, named, vocab_size=vocab_size)
    found = {token.content: tokenizer.token_to_id(token.content) for token in stated.values()}
    problems = [
        f"{token.content!r} has the id {index:,} in the settings and {found[token.content]} in {file.name}"
        for index, token in stated.items()
        if found[token.content] != index
    ]
    if problems:
        raise ConversionError(problem_list("the source's tokenizer contradicts itself", problems))
    if {repr(token) for token in tokenizer.get_added_tokens_decoder().values()} != before:
        tokenizer.save(str(file))


def _settings(folder: Path) -> tuple[dict[str, object], dict[str, object]]:
    """`tokenizer_config.json`, and what it and the map of special tokens name together."""
    try:
        settings, mapped = (
            read_json_object(folder / name) if (folder / name).is_file() else {} for name in (SETTINGS_FILE, MAP_FILE)
        )
    except ConfigError as error:
        raise ConversionError(f"the source's tokenizer cannot be used: {error}") from error
    return settings, (mapped | settings if "added_tokens_decoder" not in settings else settings)


def _stated(folder: Path, settings: Mapping[str, object], named: Mapping[str, object]) -> dict[int, "AddedToken"]:
    """Tokens with the ids that the settings give them."""
    from tokenizers import AddedToken

    stated = settings.get("added_tokens_decoder")
    try:
        if isinstance(stated, dict):
            return {int(index): _added(AddedToken, token) for index, token in stated.items()}
        if not (folder / ADDED_FILE).is_file():
            return {}
        special = set(_named_texts(named))
        return {
            _index(index): AddedToken(text, normalized=text not in special, special=text in special)
            for text, index in read_json_object(folder / ADDED_FILE).items()
        }
    except (ConfigError, ValueError, TypeError, KeyError) as error:
        raise ConversionError(f"the source's added tokens cannot be read: {error}") from error


def _added(kind: Any, token: Mapping[str, Any]) -> "AddedToken":
    added: AddedToken = kind(token["content"], **{name: token[name] for name in _FLAGS if name in token})
    return added


def _index(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no id")
    return value


def _named_texts(named: Mapping[str, object]) -> Iterator[str]:
    for name in NAMED:
        if (text := token_text(named.get(name))) is not None:
            yield text
    for name in LISTED:
        listed = named.get(name)
        for value in listed if isinstance(listed, list) else []:
            if (text := token_text(value)) is not None:
                yield text


def _add_named(tokenizer: "Tokenizer", named: Mapping[str, object], *, vocab_size: int) -> None:
    """Special tokens that are named but not known as added: those of the vocabulary become special."""
    from tokenizers import AddedToken

    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for text in dict.fromkeys(_named_texts(named)):
        has_room = tokenizer.token_to_id(text) is not None or _next_id(tokenizer) < vocab_size
        if text not in known and has_room:
            tokenizer.add_tokens([AddedToken(text, special=True)])


def _next_id(tokenizer: "Tokenizer") -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
