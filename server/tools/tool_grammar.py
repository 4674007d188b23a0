"""Grammars of answers that call tools, in the form that the model's template asks for (`server.tools.tool_forms`)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.grammar_check.sources import GrammarKind, GrammarSource, schema_text
from server.tools.tool_forms import HERMES, ToolForm

_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_TEXT = r"/(.|\n)*/"
_NO_CALL = r"/[ \n\r\t]*(([^{< \n\r\t]|<[^|])(.|\n)*|<)?/"
"""A text that no call in the form of Llama can be taken for."""
MOST_FORCED_CALLS = 16
"""In one answer that must call; one that may call ends when the model says so."""


@dataclass(frozen=True, slots=True)
class Callable:
    """A tool as far as its calls go.

    Attributes:
        name: of the function.
        parameters: JSON schema of its arguments; None: there are none.
        is_strict: whether keywords of the schema that cannot be kept to are an error.
    """

    name: str
    parameters: dict[str, Any] | None
    is_strict: bool = False


def tool_grammar(
    tools: Sequence[Callable],
    *,
    is_forced: bool,
    is_parallel: bool,
    content: GrammarSource | None = None,
    is_special: bool = False,
    form: ToolForm = HERMES,
) -> GrammarSource:
    """The language of answers that call tools.

    Args:
        tools: those that may be called, at least one.
        is_forced: whether the answer must be calls; else it may be text, too.
        is_parallel: whether there may be more than one call.
        content: a JSON schema that an answer without calls must follow; None: any text.
        is_special: whether the vocabulary has tokens of their own for the marks around calls.
        form: of the calls.

    Raises:
        server.grammar_check.sources.SourceError: a schema is nested too deeply.
    """
    rules = [f"call: {' | '.join(f'call_{number}' for number in range(len(tools)))}"]
    for number, tool in enumerate(tools):
        schema = _NO_ARGUMENTS if tool.parameters is None else {"type": "object"} | tool.parameters
        rules.append(f"call_{number}: {_written(form, tool.name, number, is_special=is_special)}")
        rules.append(f"arguments_{number}: %json {schema_text(schema, strict=tool.is_strict)}")
    calls = _calls(form, is_parallel=is_parallel, is_special=is_special)
    if is_forced:
        return _lark(f"start: {calls}", rules)
    if content is not None:
        return _lark(f"start: content | {calls}", [f"content: %json {content.text}", *rules])
    if form.is_alone:
        return _lark(f"start: {calls} | TEXT", [f"TEXT: {_NO_CALL}", *rules])
    begin = _mark(form.open, is_special=is_special)
    lead = [f"lead: TEXT {begin}" if is_special else f"lead[lazy]: TEXT {begin}", f"TEXT: {_TEXT}"]
    behind = calls.removeprefix(f"{begin} ")
    if form.in_list:
        return _lark(f"start: TEXT | lead {behind}", [*lead, *rules])
    return _lark("start: (lead call)* TEXT" if is_parallel else "start: TEXT | lead call", [*lead, *rules])


def _mark(text: str, *, is_special: bool) -> str:
    return text if is_special else json.dumps(text)


def _written(form: ToolForm, name: str, number: int, *, is_special: bool) -> str:
    """A call behind its opening mark, up to its closing one."""
    head = form.head(name)
    if form.is_alone or form.in_list:
        return f'{json.dumps(head)} arguments_{number} "}}"'
    return f'{json.dumps(chr(10) + head)} arguments_{number} "}}\\n" {_mark(form.close, is_special=is_special)}'


def _calls(form: ToolForm, *, is_parallel: bool, is_special: bool) -> str:
    """One call, or several: not any number, for a small model that must call may repeat itself without end."""
    separator, others = json.dumps(form.separator), f"{{0,{MOST_FORCED_CALLS - 1}}}"
    if form.in_list:
        several = f"call ({separator} call){others}" if is_parallel else "call"
        return f'{_mark(form.open, is_special=is_special)} "[" {several} "]"'
    begin = f"{_mark(form.open, is_special=is_special)} " if form.open else ""
    return f"{begin}call ({separator} {begin}call){others}" if is_parallel else f"{begin}call"


def _lark(start: str, rules: Sequence[str]) -> GrammarSource:
    return GrammarSource(GrammarKind.LARK, "\n".join((start, *rules)))
