"""One answer of a chat while its text grows: what was thought, is said and is called, in the shapes of the wire."""

from collections.abc import Iterable, Sequence

from server.generation.tools import new_call_id
from server.protocol.chat import ChatDelta, ChatFinishReason, ChatMessageOut
from server.protocol.sampling import FinishReasonText
from server.protocol.tools import FunctionCallOut, ToolCallOut
from server.text.reasoning import AnswerParser, AnswerPart, ThoughtPart
from server.tools.tool_calls import ArgumentsPart, CallPart, TextPart


class ChatAnswer:
    """See the module."""

    def __init__(self, parser: AnswerParser, *, shows_thought: bool = True) -> None:
        """
        Args:
            parser: takes the text apart.
            shows_thought: whether what was thought is told.
        """
        self._parser = parser
        self._shows_thought = shows_thought

    def deltas(self, text: str, *, is_last: bool) -> list[ChatDelta]:
        """What new text brings in a stream."""
        return [_delta(part) for part in self._parts(text, is_last=is_last)]

    def message(self, text: str) -> ChatMessageOut:
        """The message of a whole answer."""
        parts = self._parts(text, is_last=True)
        content = "".join(part.text for part in parts if isinstance(part, TextPart))
        thought = "".join(part.text for part in parts if isinstance(part, ThoughtPart))
        calls = tuple(
            ToolCallOut(
                id=new_call_id(),
                type="function",
                function=FunctionCallOut(name=part.name, arguments=_arguments(parts, part.index)),
            )
            for part in parts
            if isinstance(part, CallPart)
        )
        return ChatMessageOut(
            role="assistant",
            content=content if content or not calls else None,
            refusal=None,
            **({"reasoning_content": thought, "reasoning": thought} if thought else {}),
            **({"tool_calls": calls} if calls else {}),
        )

    def finish_reason(self, reason: FinishReasonText) -> ChatFinishReason:
        """How the answer ended: with calls, if there are any and it ended by itself."""
        return "tool_calls" if self._parser.num_calls > 0 and reason == "stop" else reason

    def _parts(self, text: str, *, is_last: bool) -> Sequence[AnswerPart]:
        parts = self._parser.push(text, is_last=is_last)
        return parts if self._shows_thought else [part for part in parts if not isinstance(part, ThoughtPart)]


def _delta(part: AnswerPart) -> ChatDelta:
    match part:
        case ThoughtPart(text):
            return ChatDelta(reasoning_content=text, reasoning=text)
        case TextPart(text):
            return ChatDelta(content=text)
        case CallPart(index, name):
            function = FunctionCallOut(name=name, arguments="")
            return ChatDelta(
                tool_calls=(ToolCallOut(index=index, id=new_call_id(), type="function", function=function),)
            )
        case ArgumentsPart(index, text):
            return ChatDelta(tool_calls=(ToolCallOut(index=index, function=FunctionCallOut(arguments=text)),))


def _arguments(parts: Iterable[AnswerPart], index: int) -> str:
    return "".join(part.text for part in parts if isinstance(part, ArgumentsPart) and part.index == index)
