"""The chat format of a model: conversations as its template writes them (`dijiang_model.text.template`), as tokens.

What users write inside their messages stays text: a special token typed by a user is split by a marker before
rendering, so that the tokenizer recognises exactly those special tokens that the template itself has written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dijiang_model.text.template import Template, TemplateFailure
from server.text.tokenizer import Tokenizer
from server.tools.tool_prompt import without_tools

MAX_EXPANSION = 8
MIN_OUTPUT_CHARACTERS = 1 << 20
TemplateValue = str | int | float | bool | None
NO_VARIABLES: Mapping[str, TemplateValue] = {}
MARKERS = tuple(map(chr, range(0xE000, 0xF900)))


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message as the template sees it: `role` is one of a few words, `content` any text.

    Attributes:
        tool_calls: `{"id", "type": "function", "function": {"name", "arguments"}}`, the arguments as a value.
        tool_call_id: of a message with the role `tool`: which call it answers.
        reasoning: what the assistant thought before it said this.
    """

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None


class ChatTemplate:
    """The chat format of one model.

    Attributes:
        knows_tools: whether the template has a place for tools; else they are told in a system message.
        variables: names that the template asks for.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `TemplateSyntaxFailure`. The tokenizer must have a template."""
        assert tokenizer.chat_template is not None
        self._tokenizer = tokenizer
        self._knows_developer = "developer" in tokenizer.chat_template
        self._template = Template(tokenizer.chat_template)
        self.variables = self._template.variables
        self.knows_tools = "tools" in self.variables

    def encode(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, TemplateValue] = NO_VARIABLES,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Token ids of the rendered conversation.

        Args:
            tools: what may be called, `{"type": "function", "function": {...}}` each.
            variables: further variables of the template; special tokens in their texts stay text.

        Raises:
            TemplateFailure: the template raised an exception or went over a limit.
        """
        conversation, marker = self._protect(self._conversation(messages, tools, variables))
        text = self._finished(conversation, add_generation_prompt, continue_final_message)
        if marker is None:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        prefix = self._tokenizer.encode("", add_special_tokens=add_special_tokens)
        return prefix + self._encode_marked(text, marker)

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, TemplateValue] = NO_VARIABLES,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The conversation as text, for reading. Arguments and errors as in `encode`."""
        conversation = self._conversation(messages, tools, variables)
        return self._finished(conversation, add_generation_prompt, continue_final_message)

    def _conversation(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, TemplateValue],
    ) -> dict[str, Any]:
        """Messages and tools as values, as far as the template has a place for them."""
        values: list[Mapping[str, Any]] = [self._variables(message) for message in messages]
        if self.knows_tools:
            return {"messages": values, "tools": [*tools], "variables": variables}
        return {"messages": without_tools(values, tools), "tools": [], "variables": variables}

    def _finished(
        self, conversation: Mapping[str, Any], add_generation_prompt: bool, continue_final_message: bool
    ) -> str:
        if not continue_final_message:
            return self._rendered(conversation, add_generation_prompt=add_generation_prompt)
        *before, last = conversation["messages"]
        content = last["content"] or ""
        if not content and last.get("tool_calls"):
            return self._rendered(conversation, add_generation_prompt=False)
        # A mark at its end, and before leading white space, so that the content is found and nothing of it is trimmed.
        mark = next((mark for mark in MARKERS if not any(mark in text for text in _texts(conversation))), None)
        if mark is None:
            raise TemplateFailure("the messages use every private-use character")
        lead = mark if content[:1].isspace() else ""
        marked = {**conversation, "messages": [*before, {**last, "content": lead + content + mark}]}
        text, found, _ = self._rendered(marked, add_generation_prompt=False).rpartition(mark)
        if not found or not text.endswith(lead + content):
            raise TemplateFailure("continue_final_message: the chat template does not write the last message as it is")
        return text.removesuffix(lead + content) + content

    def _rendered(self, conversation: Mapping[str, Any], *, add_generation_prompt: bool) -> str:
        try:
            return self._render(conversation, add_generation_prompt=add_generation_prompt)
        except TemplateFailure:
            if all(message["content"] is not None for message in conversation["messages"]):
                raise
            # Beside calls there is no content; templates that cannot have none get an empty one.
            messages = [{**message, "content": message["content"] or ""} for message in conversation["messages"]]
            return self._render({**conversation, "messages": messages}, add_generation_prompt=add_generation_prompt)

    def _render(self, conversation: Mapping[str, Any], *, add_generation_prompt: bool) -> str:
        size = sum(map(len, _texts(conversation)))
        limit = max(MIN_OUTPUT_CHARACTERS, MAX_EXPANSION * size)
        variables = {
            **conversation["variables"],
            "messages": conversation["messages"],
            "add_generation_prompt": add_generation_prompt,
            "tools": conversation["tools"] or None,  # templates ask whether there are any
            "documents": None,
            **self._tokenizer.special_tokens,
        }
        return self._template.render(variables, max_characters=limit)

    def _variables(self, message: ChatMessage) -> dict[str, Any]:
        role = message.role
        if role == "developer" and not self._knows_developer:
            role = "system"
        content = None if message.tool_calls and not message.content else message.content
        variables: dict[str, Any] = {"role": role, "content": content}
        if message.name is not None:
            variables["name"] = message.name
        if message.tool_calls:
            variables["tool_calls"] = [*message.tool_calls]
        if message.tool_call_id is not None:
            variables["tool_call_id"] = message.tool_call_id
        if message.reasoning is not None:
            variables["reasoning_content"] = message.reasoning
        return variables

    def _protect(self, conversation: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """Splits special tokens typed by users; returns the marker used, None if there was none."""
        try:
            texts = [*_texts(conversation)]
        except RecursionError:
            raise TemplateFailure("the messages or tools are nested too deeply") from None
        if not any(self._tokenizer.find_special_tokens(text) for text in texts):
            return conversation, None
        used = set().union(*texts, self._tokenizer.chat_template or "")
        marker = next((marker for marker in MARKERS if marker not in used), None)
        if marker is None:
            raise TemplateFailure("the messages use every private-use character next to special tokens")

        def split(text: str) -> str:
            for begin, _ in reversed(self._tokenizer.find_special_tokens(text)):
                text = text[: begin + 1] + marker + text[begin + 1 :]
            return text

        protected: dict[str, Any] = _map_texts(conversation, split)
        return protected, marker

    def _encode_marked(self, text: str, marker: str) -> list[int]:
        token_ids: list[int] = []
        position = 0
        for begin, end in self._tokenizer.find_special_tokens(text):
            plain = text[position:begin].replace(marker, "")
            token_ids += self._tokenizer.encode_plain(plain, continues=position > 0)
            token_ids.append(self._tokenizer.special_token_id(text[begin:end]))
            position = end
        return token_ids + self._tokenizer.encode_plain(text[position:].replace(marker, ""), continues=position > 0)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value of JSON's kinds, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _map_texts(item, change) for key, item in value.items()}
    return [_map_texts(item, change) for item in value] if isinstance(value, list | tuple) else value


def template_of(tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """The chat template of a model; None if it has none.

    Raises:
        TemplateSyntaxFailure: it cannot be read.
    """
    return None if tokenizer is None or tokenizer.chat_template is None else ChatTemplate(tokenizer)
