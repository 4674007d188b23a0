"""Tools, grammars and reasoning on their way through a request: told to the model, kept to, and found in its answers.

What a model thinks before it answers is no part of what a grammar is about: it comes first, unconstrained.
"""

import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from server.engine.types.requests import EngineInfo, GrammarSpec
from server.errors import InvalidRequestError, OverloadedError
from server.grammar_check.checker import GrammarRefusedError, GrammarsBusyError
from server.grammar_check.sources import GrammarKind, GrammarSource, Lead, SourceError
from server.protocol.structure import WantedGrammar
from server.protocol.tools import FunctionDefinition, ToolUse
from server.service import Service
from server.text.reasoning import Thinking, ThoughtStart
from server.text.tokenizer import Tokenizer
from server.tools.tool_forms import ToolForm, tool_form
from server.tools.tool_grammar import Callable, tool_grammar


def template_tools(use: ToolUse | None) -> tuple[Mapping[str, Any], ...]:
    """Tools as chat templates expect them."""
    return () if use is None else tuple(_template_tool(function) for function in use.offered)


def form_of(tokenizer: Tokenizer | None) -> ToolForm:
    """How the model writes calls."""
    return tool_form(None if tokenizer is None else tokenizer.chat_template)


def call_token_ids(tokenizer: Tokenizer | None) -> frozenset[int]:
    """Special tokens that are the marks around calls, in vocabularies that have them; they are text, then."""
    if tokenizer is None:
        return frozenset()
    marks = form_of(tokenizer).marks
    if any(tokenizer.find_special_tokens(mark) != [(0, len(mark))] for mark in marks):
        return frozenset()
    return frozenset(map(tokenizer.special_token_id, marks))


async def checked_grammar(
    service: Service,
    info: EngineInfo,
    wanted: WantedGrammar | None,
    *,
    owner: str,
    use: ToolUse | None = None,
    thinking: Thinking | None = None,
) -> GrammarSpec | None:
    """The grammar of answers that may call tools, and must look as `wanted` says where they do not; None: any text.

    Args:
        owner: whose request it is.
        thinking: what comes before; None: nothing.

    Raises:
        InvalidRequestError: a schema or grammar is refused or does not go with tools, or the model has no text.
        OverloadedError: too many grammars wait to be compiled.
    """
    if use is not None and (wanted is not None or not use.is_free):
        await _checked(service, info, wanted, owner)
        is_special = bool(call_token_ids(service.tokenizer))
        content = None if wanted is None else wanted.source
        source = _source(use, content, form=form_of(service.tokenizer), is_special=is_special)
        wanted = WantedGrammar(source, "tools")
    return await _checked(service, info, _behind(thinking, wanted), owner)


async def _checked(service: Service, info: EngineInfo, wanted: WantedGrammar | None, owner: str) -> GrammarSpec | None:
    if wanted is None:
        return None
    if service.grammars is None:
        raise InvalidRequestError(
            f"`{wanted.param}` needs text, and this model has no tokenizer", param=wanted.param, code="no_tokenizer"
        )
    try:
        return await service.grammars.check(wanted.source, info, key=owner)
    except GrammarRefusedError as error:
        raise InvalidRequestError(f"{wanted.param}: {error}", param=wanted.param, code="invalid_value") from error
    except GrammarsBusyError as error:
        raise OverloadedError("too many grammars wait to be compiled") from error


def _behind(thinking: Thinking | None, wanted: WantedGrammar | None) -> WantedGrammar | None:
    """The same, behind what is thought."""
    if wanted is None or thinking is None or thinking.begin is ThoughtStart.CLOSED:
        return wanted
    lead = Lead.THOUGHT if thinking.begin is ThoughtStart.OPENED else Lead.MAYBE_THOUGHT
    return replace(wanted, source=replace(wanted.source, lead=lead, is_lead_special=thinking.form.is_special))


def _template_tool(function: FunctionDefinition) -> Mapping[str, Any]:
    told: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        told["description"] = function.description
    told["parameters"] = {"type": "object", "properties": {}} if function.parameters is None else function.parameters
    return {"type": "function", "function": told}


def _source(use: ToolUse, content: GrammarSource | None, *, form: ToolForm, is_special: bool) -> GrammarSource:
    if content is not None and not use.is_forced and content.kind is not GrammarKind.JSON_SCHEMA:
        raise InvalidRequestError(
            "beside tools, `structured_outputs` may be JSON only; or set `tool_choice` to none",
            param="structured_outputs",
            code="invalid_value",
        )
    tools = [Callable(tool.name, tool.parameters, is_strict=tool.strict is True) for tool in use.callable]
    try:
        return tool_grammar(
            tools,
            is_forced=use.is_forced,
            is_parallel=use.is_parallel,
            content=content,
            is_special=is_special,
            form=form,
        )
    except SourceError as error:
        raise InvalidRequestError(f"tools: {error}", param="tools", code="invalid_value") from error


def new_call_id() -> str:
    """Not to be guessed, like all ids."""
    return f"call_{uuid.uuid4().hex[:24]}"
