"""The forms in which models write calls of tools; which one it is, the chat template says.

    Hermes, ChatML    <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>, any number of them, text around
    Llama 3           {"name": ..., "parameters": {...}}; {...}, the whole answer, perhaps behind <|python_tag|>
    Mistral           [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], text before it

A template that says nothing of tools gets the first one: `server.tools.tool_prompt` tells the model of it.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.tools.call_heads import WHITESPACE
from server.tools.tool_calls import CLOSE, OPEN, CallParser, CallPosition, Part, ToolCallParser, num_held

PYTHON_TAG = "<|python_tag|>"
MISTRAL_OPEN = "[TOOL_CALLS]"
_SEPARATORS = WHITESPACE + ";,"
_INTRODUCTION = (
    "# Tools\n\nFrom now on you may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_INSTRUCTION = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments like this:\n"
)


class LlamaCallParser(CallParser):
    """Calls in the form of Llama 3: the answer is nothing else."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._is_at_start = True

    def _text(self, parts: list[Part]) -> bool:
        if not self._is_at_start:
            return self._release(parts, 0)
        seen = self._buffer.lstrip(WHITESPACE)
        if not self._is_last and (not seen or (len(seen) < len(PYTHON_TAG) and PYTHON_TAG.startswith(seen))):
            return False
        self._is_at_start = False
        self._opening = ""
        if seen.startswith(PYTHON_TAG):
            self._opening = PYTHON_TAG
            seen = seen[len(PYTHON_TAG) :]
        elif not seen.startswith("{"):
            return True
        self._held += self._buffer[: len(self._buffer) - len(self._buffer.lstrip(WHITESPACE))]
        self._buffer = seen
        self._place = CallPosition.HEAD
        return True

    def _tail(self, parts: list[Part]) -> bool:
        if not self._object_ended():
            return False
        self._buffer = self._buffer.lstrip(_SEPARATORS)
        if not self._buffer and not self._is_last:
            return False
        self._is_at_start = self._buffer.startswith("{") or PYTHON_TAG.startswith(self._buffer[: len(PYTHON_TAG)])
        self._place = CallPosition.TEXT
        return bool(self._buffer)


class MistralCallParser(CallParser):
    """Calls in the form of Mistral: one list, behind a token of its own."""

    def _text(self, parts: list[Part]) -> bool:
        begin = self._buffer.find(MISTRAL_OPEN)
        if begin < 0:
            return self._release(parts, num_held(self._buffer, MISTRAL_OPEN))
        self._emit(parts, self._buffer[:begin])
        rest = self._buffer[begin + len(MISTRAL_OPEN) :]
        opened = re.match(r"\s*\[", rest)
        if opened is None and not rest.strip() and not self._is_last:
            self._buffer = self._buffer[begin:]
            return False
        self._opening = MISTRAL_OPEN + (opened.group() if opened is not None else "")
        self._buffer = rest if opened is None else rest[opened.end() :]
        self._place = CallPosition.HEAD
        return True

    def _tail(self, parts: list[Part]) -> bool:
        if not self._object_ended():
            return False
        self._buffer = self._buffer.lstrip(WHITESPACE)
        if not self._buffer:
            return False
        self._opening = self._buffer[0]
        self._place = CallPosition.HEAD if self._opening == "," else CallPosition.TEXT
        self._buffer = self._buffer[1:] if self._opening in ",]" else self._buffer
        return True


@dataclass(frozen=True, slots=True)
class ToolForm:
    """One of the forms.

    Attributes:
        parser: finds calls in answers.
        marks: texts around calls that may be tokens of their own; they are text, then.
        open / close: around each call, or, if `in_list`, around all of them.
        key: of the arguments in a call's object.
        separator: between calls.
        in_list: whether `open` and `close` are around all calls together.
        is_alone: whether there is no text beside calls.
    """

    parser: type[CallParser]
    marks: tuple[str, ...]
    open: str
    close: str
    key: str
    separator: str
    in_list: bool = False
    is_alone: bool = False

    def told(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """Tools in words, for a message of the system."""
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        example = f'{{"name": <function-name>, "{self.key}": <args-json-object>}}'
        if self.in_list:
            example = f"{self.open}[{example}]"
        elif self.open:
            example = f"{self.open}\n{example}\n{self.close}"
        return f"{_INTRODUCTION}{listed}{_INSTRUCTION}{example}"

    def head(self, name: str) -> str:
        """How the object of a call begins."""
        return f'{{"name": {json.dumps(name)}, "{self.key}": '


HERMES = ToolForm(ToolCallParser, (OPEN, CLOSE), OPEN, CLOSE, "arguments", "\n")
LLAMA = ToolForm(LlamaCallParser, (PYTHON_TAG,), "", "", "parameters", "; ", is_alone=True)
MISTRAL = ToolForm(MistralCallParser, (MISTRAL_OPEN,), MISTRAL_OPEN, "", "arguments", ", ", in_list=True)


def tool_form(template: str | None) -> ToolForm:
    """The form that a chat template asks its model for; `template`: its source."""
    source = "" if template is None else template
    if OPEN in source:
        return HERMES
    if MISTRAL_OPEN in source:
        return MISTRAL
    if PYTHON_TAG in source or ('{"name": ' in source and '"parameters": ' in source):
        return LLAMA
    return HERMES
