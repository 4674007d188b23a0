"""How a model is talked to: conversations in the form of its own chat template."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dijiang_model.errors import ConversionError
from dijiang_model.text.folder import UnsupportedTokenizerError, read_tokenizer_files
from dijiang_model.text.template import Template, TemplateFailure, TemplateSyntaxFailure

MAX_PROMPT_CHARACTERS = 1 << 20

Message = Mapping[str, str]
"""`role`, user or assistant, and `content`."""
RenderChat = Callable[[Sequence[Message]], str]
"""A conversation as text. One that ends with the user asks for an answer."""


def load_chat_template(folder: Path) -> RenderChat | None:
    """Returns what makes text of a conversation; None for a model without a chat template.

    Raises:
        ConversionError: a template that is no valid one, or that fails on a plain question; later, also one that
            fails on the conversation.
    """
    try:
        files = read_tokenizer_files(folder)
        if files is None or files.chat_template is None:
            return None
        template = Template(files.chat_template)
    except (UnsupportedTokenizerError, TemplateSyntaxFailure) as error:
        raise ConversionError(f"the chat template of {folder.name} cannot be used: {error}") from error
    special_tokens = files.special_tokens

    def render(messages: Sequence[Message]) -> str:
        is_asked = messages[-1]["role"] == "user"
        variables = {"messages": messages, "add_generation_prompt": is_asked, "tools": None, "documents": None}
        try:
            return template.render({**variables, **special_tokens}, max_characters=MAX_PROMPT_CHARACTERS)
        except TemplateFailure as error:
            raise ConversionError(f"the chat template of {folder.name} cannot put a question: {error}") from error

    render([{"role": "user", "content": "?"}])
    return render


def load_chat_prompt(folder: Path) -> Callable[[str], str] | None:
    """Returns what makes a prompt of a user's question; see `load_chat_template`."""
    render = load_chat_template(folder)
    return None if render is None else lambda question: render([{"role": "user", "content": question}])


def plain_chat(messages: Sequence[Message]) -> str:
    """A conversation for models without a chat template: paragraphs that begin with who speaks."""
    spoken = "".join(f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages)
    return f"{spoken}Assistant:" if messages[-1]["role"] == "user" else spoken
