"""Tools on their way through a chat request: told to the model, kept to by a grammar, and found in the answers."""

import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from server.engine.types import EngineInfo, GrammarSpec
from server.errors import InvalidRequestError
from server.protocol.chat import ChatDelta, ChatFinishReason, ChatMessageOut
from server.protocol.sampling import FinishReasonText
from server.protocol.structure import WantedGrammar
from server.protocol.tools import FunctionCallOut, FunctionDefinition, ToolCallOut, ToolUse
from server.routes.structure import checked_grammar
from server.service import Service
from server.structure.sources import GrammarKind, GrammarSource, SourceError
from server.structure.tool_grammar import Callable, tool_grammar
from server.text.tokenizer import Tokenizer
from server.text.tool_calls import ArgumentsPart, CallParser, CallPart, Part, TextPart
from server.text.tool_forms import ToolForm, tool_form


def told_tools(use: ToolUse | None) -> tuple[Mapping[str, Any], ...]:
    """Tools as chat templates expect them."""
    return () if use is None else tuple(_told(function) for function in use.offered)


def form_of(service: Service) -> ToolForm:
    """How the model writes calls."""
    return tool_form(None if service.tokenizer is None else service.tokenizer.chat_template)


def call_parser(service: Service, use: ToolUse) -> CallParser:
    """Finds the calls in an answer."""
    return form_of(service).parser([function.name for function in use.callable])


def call_token_ids(tokenizer: Tokenizer | None) -> frozenset[int]:
    """Special tokens that are the marks around calls, in vocabularies that have them; they are text, then."""
    if tokenizer is None:
        return frozenset()
    marks = tool_form(tokenizer.chat_template).marks
    if any(tokenizer.find_special_tokens(mark) != [(0, len(mark))] for mark in marks):
        return frozenset()
    return frozenset(map(tokenizer.special_token_id, marks))


async def checked_form(
    service: Service, info: EngineInfo, wanted: WantedGrammar | None, use: ToolUse | None
) -> GrammarSpec | None:
    """The grammar of answers that may call tools, and must look as `wanted` says where they do not.

    Raises:
        InvalidRequestError: a schema or grammar is refused, or does not go with tools.
        OverloadedError: too many grammars wait to be compiled.
    """
    content = await checked_grammar(service, info, wanted)
    if use is None or (use.is_free and wanted is None):
        return content
    is_special = bool(call_token_ids(service.tokenizer))
    source = _source(use, None if wanted is None else wanted.source, form=form_of(service), is_special=is_special)
    return await checked_grammar(service, info, WantedGrammar(source, "tools"))


class ToolAnswer:
    """One answer that may call tools, while its text grows."""

    def __init__(self, parser: CallParser | None) -> None:
        """`parser`: None where nothing may be called."""
        self._parser = parser

    def deltas(self, text: str, *, is_last: bool) -> list[ChatDelta]:
        """What new text brings in a stream."""
        if self._parser is None:
            return [ChatDelta(content=text)] if text else []
        return [_delta(part) for part in self._parts(text, is_last=is_last)]

    def message(self, text: str) -> ChatMessageOut:
        """The message of a whole answer."""
        if self._parser is None:
            return ChatMessageOut(role="assistant", content=text, refusal=None)
        parts = self._parts(text, is_last=True)
        content = "".join(part.text for part in parts if isinstance(part, TextPart))
        calls = tuple(
            ToolCallOut(
                id=new_call_id(),
                type="function",
                function=FunctionCallOut(name=part.name, arguments=_arguments(parts, part.index)),
            )
            for part in parts
            if isinstance(part, CallPart)
        )
        if not calls:
            return ChatMessageOut(role="assistant", content=content, refusal=None)
        return ChatMessageOut(role="assistant", content=content if content else None, refusal=None, tool_calls=calls)

    def finish_reason(self, reason: FinishReasonText) -> ChatFinishReason:
        """How the answer ended: with calls, if there are any and it ended by itself."""
        has_calls = self._parser is not None and self._parser.num_calls > 0
        return "tool_calls" if has_calls and reason == "stop" else reason

    def _parts(self, text: str, *, is_last: bool) -> list[Part]:
        assert self._parser is not None
        parts = self._parser.push(text)
        return parts + self._parser.finish() if is_last else parts


def _told(function: FunctionDefinition) -> Mapping[str, Any]:
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


def _delta(part: Part) -> ChatDelta:
    match part:
        case TextPart(text):
            return ChatDelta(content=text)
        case CallPart(index, name):
            function = FunctionCallOut(name=name, arguments="")
            return ChatDelta(
                tool_calls=(ToolCallOut(index=index, id=new_call_id(), type="function", function=function),)
            )
        case ArgumentsPart(index, text):
            return ChatDelta(tool_calls=(ToolCallOut(index=index, function=FunctionCallOut(arguments=text)),))


def _arguments(parts: Iterable[Part], index: int) -> str:
    return "".join(part.text for part in parts if isinstance(part, ArgumentsPart) and part.index == index)


def new_call_id() -> str:
    """Not to be guessed, like all ids."""
    return f"call_{uuid.uuid4().hex[:24]}"
