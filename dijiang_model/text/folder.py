"""The files of a model folder that concern text: which there are, and what they say. No tokenizer is built here."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dijiang_model.formats.stub_files import stub_problem

TOKENIZER_FILE, SETTINGS_FILE, MAP_FILE = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE_FILE, PROCESSOR_TEMPLATE_FILE = "chat_template.jinja", "chat_template.json"
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class UnsupportedTokenizerError(ValueError):
    """A tokenizer whose files are damaged, or that cannot be turned back into text token by token."""


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a model folder says about its tokenizer.

    Attributes:
        tokenizer_json: the text of `tokenizer.json`.
        special_tokens: `bos_token`, `eos_token`, ... -> literal text, as far as they are named.
        chat_template: the Jinja source, if there is one.
        tokenizer_class: the name in `tokenizer_config.json`, for information.
    """

    tokenizer_json: str
    special_tokens: dict[str, str]
    chat_template: str | None = None
    tokenizer_class: str | None = None


def read_tokenizer_files(folder: Path) -> TokenizerFiles | None:
    """Returns what a folder says; None if it has no tokenizer.

    Raises:
        UnsupportedTokenizerError: a file is damaged.
    """
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        return None
    settings = _read_json(folder / SETTINGS_FILE)
    named = _read_json(folder / MAP_FILE) | settings
    special_tokens = {name: text for name in SPECIAL_TOKEN_NAMES if (text := token_text(named.get(name))) is not None}
    tokenizer_class = settings.get("tokenizer_class")
    return TokenizerFiles(
        tokenizer_json=_read(file),
        special_tokens=special_tokens,
        chat_template=_chat_template(folder, settings),
        tokenizer_class=tokenizer_class if isinstance(tokenizer_class, str) else None,
    )


def token_text(value: object) -> str | None:
    """A token is named by its text, or by an object with the text in `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """As transformers looks: a file of its own, the settings, then what belongs to a processor."""
    if (folder / TEMPLATE_FILE).is_file():
        return _read(folder / TEMPLATE_FILE)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name; `default` is the one for plain conversations
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is None:
        template = _read_json(folder / PROCESSOR_TEMPLATE_FILE).get("chat_template")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnsupportedTokenizerError):
            raise
        raise UnsupportedTokenizerError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UnsupportedTokenizerError(f"{path.name} does not hold an object")
    return content


def _read(path: Path) -> str:
    try:
        problem = stub_problem(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnsupportedTokenizerError(f"{path} cannot be read: {error}") from error
    if problem is not None:
        raise UnsupportedTokenizerError(problem)
    return text
