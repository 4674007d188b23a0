"""How a model is asked: a question in the form of its own chat template."""

from collections.abc import Callable
from pathlib import Path

from dijiang_model.errors import ConversionError
from dijiang_model.text.folder import UnsupportedTokenizerError, read_tokenizer_files
from dijiang_model.text.template import Template, TemplateFailure, TemplateSyntaxFailure

MAX_PROMPT_CHARACTERS = 1 << 20


def load_chat_prompt(folder: Path) -> Callable[[str], str] | None:
    """What makes a prompt of a user's question; None for a model without a chat template.

    Raises:
        ConversionError: a template that is no valid one, or that fails on a plain question.
    """
    try:
        files = read_tokenizer_files(folder)
        if files is None or files.chat_template is None:
            return None
        template = Template(files.chat_template)
    except (UnsupportedTokenizerError, TemplateSyntaxFailure) as error:
        raise ConversionError(f"the chat template of {folder.name} cannot be used: {error}") from error
    special_tokens = files.special_tokens

    def prompt(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        variables = {"messages": messages, "add_generation_prompt": True, "tools": None, "documents": None}
        try:
            return template.render({**variables, **special_tokens}, max_characters=MAX_PROMPT_CHARACTERS)
        except TemplateFailure as error:
            raise ConversionError(f"the chat template of {folder.name} cannot put a question: {error}") from error

    prompt("?")
    return prompt
