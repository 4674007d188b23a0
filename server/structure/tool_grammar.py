"""Grammars of answers that call tools, in the form that `server.text.tool_calls` reads."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.structure.sources import GrammarKind, GrammarSource, schema_text
from server.text.tool_calls import CLOSE, OPEN

_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_TEXT = r"/(.|\n)*/"


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
) -> GrammarSource:
    """The language of answers that call tools.

    Args:
        tools: those that may be called, at least one.
        is_forced: whether the answer must be calls; else it may be text, too.
        is_parallel: whether there may be more than one call.
        content: a JSON schema that an answer without calls must follow; None: any text.
        is_special: whether the vocabulary has tokens of their own for the marks around calls.

    Raises:
        server.structure.sources.SourceError: a schema is nested too deeply.
    """
    begin, end = (OPEN, CLOSE) if is_special else (json.dumps(OPEN), json.dumps(CLOSE))
    rules = [f"call: {' | '.join(f'call_{number}' for number in range(len(tools)))}"]
    for number, tool in enumerate(tools):
        head = json.dumps(f'\n{{"name": {json.dumps(tool.name)}, "arguments": ')
        schema = _NO_ARGUMENTS if tool.parameters is None else {"type": "object"} | tool.parameters
        rules.append(f'call_{number}: {head} arguments_{number} "}}\\n" {end}')
        rules.append(f"arguments_{number}: %json {schema_text(schema, strict=tool.is_strict)}")
    calls = f'{begin} call ("\\n" {begin} call)*' if is_parallel else f"{begin} call"
    if is_forced:
        return _lark(f"start: {calls}", rules)
    if content is not None:
        return _lark(f"start: content | {calls}", [f"content: %json {content.text}", *rules])
    lead = [f"lead: TEXT {begin}" if is_special else f"lead[lazy]: TEXT {begin}", f"TEXT: {_TEXT}"]
    return _lark("start: (lead call)* TEXT" if is_parallel else "start: TEXT | lead call", [*lead, *rules])


def _lark(start: str, rules: Sequence[str]) -> GrammarSource:
    return GrammarSource(GrammarKind.LARK, "\n".join((start, *rules)))
