"""How a model is asked: a question in the form of its own chat template."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dijiang_model.errors import ConversionError
from dijiang_model.formats.json_fields import read_json_object

TEMPLATE_FILE = "chat_template.jinja"
_SETTINGS_FILES = ("special_tokens_map.json", "tokenizer_config.json")
"""Later files overrule earlier ones."""


def load_chat_prompt(folder: Path) -> Callable[[str], str] | None:
    """What makes a prompt of a user's question; None for a model without a chat template.

    Raises:
        ConversionError: a template that is no valid one, or that fails on a plain question.
    """
    settings: dict[str, object] = {}
    for name in _SETTINGS_FILES:
        settings |= read_json_object(folder / name) if (folder / name).is_file() else {}
    file = folder / TEMPLATE_FILE
    source = file.read_text("utf-8") if file.is_file() else settings.get("chat_template")
    if not isinstance(source, str):
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    environment.policies["json.dumps_function"] = json.dumps
    tokens = {
        name: text for name in ("bos_token", "eos_token") if (text := _token_text(settings.get(name))) is not None
    }

    def prompt(question: str) -> str:
        message = {"role": "user", "content": question}
        try:
            template = environment.from_string(source)
            return template.render(messages=[message], add_generation_prompt=True, **tokens)
        except TemplateError as error:
            raise ConversionError(f"the chat template of {folder.name} cannot put a question: {error}") from error

    prompt("?")
    return prompt


def _refuse(message: str) -> Any:
    raise TemplateError(message)


def _token_text(value: object) -> str | None:
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None
