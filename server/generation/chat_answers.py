"""The answers of a chat on the wire: what was thought, is said and is called, whole or in chunks."""

from collections.abc import Iterable, Sequence
from typing import Any

from server.generation.choice import Answer, TextDelta
from server.generation.generation import Generation
from server.generation.logprobs import ScoredTokens
from server.generation.streaming import OpenAIWriter
from server.generation.tools import new_call_id
from server.http.sse import DONE, event
from server.protocol.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatFinishReason,
    ChatMessageOut,
    ChatRequest,
)
from server.protocol.logprobs import ChatLogprobs
from server.protocol.sampling import FinishReasonText
from server.protocol.tools import FunctionCallOut, ToolCallOut
from server.service import Service
from server.text.reasoning import AnswerParser, AnswerPart, ThoughtPart
from server.tools.tool_calls import ArgumentsPart, CallPart, TextPart


class ChatAnswer:
    """One answer of a chat while its text grows."""

    def __init__(self, parser: AnswerParser, *, shows_thought: bool = True) -> None:
        """
        Args:
            parser: takes the text apart.
            shows_thought: whether what was thought is told.
        """
        self._parser = parser
        self._shows_thought = shows_thought

    def deltas(self, text: str, reason: FinishReasonText | None) -> list[ChatDelta]:
        """What new text brings in a stream; `reason`: why it ends, if it does."""
        return [_delta(part) for part in self._parts(text, reason)]

    def message(self, text: str, reason: FinishReasonText) -> ChatMessageOut:
        """The message of a whole answer."""
        parts = self._parts(text, reason)
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
            content=content if content or not (calls or self._parser.is_forced) else None,
            refusal=None,
            annotations=(),
            **({"reasoning_content": thought, "reasoning": thought} if thought else {}),
            **({"tool_calls": calls} if calls else {}),
        )

    def finish_reason(self, reason: FinishReasonText) -> ChatFinishReason:
        """How the answer ended: with calls, if there are any and it ended by itself."""
        return "tool_calls" if self._parser.num_calls > 0 and reason == "stop" else reason

    def _parts(self, text: str, reason: FinishReasonText | None) -> Sequence[AnswerPart]:
        parts = self._parser.push(text, is_last=reason is not None, is_cut=reason == "length")
        return parts if self._shows_thought else [part for part in parts if not isinstance(part, ThoughtPart)]


class ChatWriter(OpenAIWriter):
    """Writes `chat.completion` objects."""

    def __init__(self, service: Service, generation: Generation) -> None:
        super().__init__(service, generation)
        plan = generation.plan
        assert isinstance(plan.fields, ChatRequest)
        self._head["id"] = f"chatcmpl-{plan.fields.own_id}"
        shows_thought = plan.fields.include_reasoning is not False
        self._answers = [ChatAnswer(plan.answer_parser(), shows_thought=shows_thought) for _ in plan.requests]

    def whole(self, answers: Sequence[Answer]) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=self._answers[index].message(answer.text, answer.finish_reason),
                logprobs=self._chat_logprobs(answer.output),
                finish_reason=self._answers[index].finish_reason(answer.finish_reason),
                stop_reason=answer.stop,
                **self._token_ids(tuple(answer.token_ids)),
                **self._state(answer),
            )
            for index, answer in enumerate(answers)
        ]
        return ChatCompletion(
            **self._head,
            object="chat.completion",
            choices=choices,
            usage=self._generation.usage,
            **self._prompt_token_ids(),
            **self._prompt_logprobs(answers[0].prompt),
        )

    def begin(self) -> Sequence[bytes]:
        opening = ChatDelta(role="assistant", content="")
        return [
            self._chunk(index, opening, **(self._prompt_token_ids() if index == 0 else {}))
            for index in range(len(self._answers))
        ]

    def delta(self, delta: TextDelta) -> Sequence[bytes]:
        """The new text or calls, if there are any; then the end, if it is there."""
        answer, reason, index = self._answers[delta.index], delta.finish_reason, delta.index
        new: dict[str, Any] = {"token_ids": delta.token_ids}
        if delta.output is not None:
            new["output"] = [delta.output]
        if delta.prompt is not None and index == 0:
            new |= self._prompt_logprobs([delta.prompt])
        deltas = answer.deltas(delta.text, reason)
        sends_tokens = self._with_token_ids or "output" in new
        if not deltas and ("prompt_logprobs" in new or (sends_tokens and reason is None)):
            deltas = [ChatDelta(content="")]
        chunks: list[bytes] = []
        for part in deltas:
            chunks.append(self._chunk(index, part, **new))
            new = {}
        if reason is not None:
            end = answer.finish_reason(reason)
            chunks.append(self._chunk(index, ChatDelta(), finish_reason=end, end=delta, **new))
        return chunks

    def end(self) -> Sequence[bytes]:
        if not self._fields.wants_usage:
            return [DONE]
        return [self._event(choices=[], usage=self._generation.usage), DONE]

    def _chunk(
        self,
        index: int,
        delta: ChatDelta,
        *,
        token_ids: tuple[int, ...] = (),
        output: Sequence[ScoredTokens] = (),
        finish_reason: ChatFinishReason | None = None,
        end: TextDelta | None = None,
        **more: Any,
    ) -> bytes:
        choice = ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._chat_logprobs(output) if output else None,
            finish_reason=finish_reason,
            **self._token_ids(token_ids),
            **({} if end is None else {"stop_reason": end.stop, **self._state(end)}),
        )
        return self._event(choices=[choice], **self._usage(), **more)

    def _event(self, **fields: Any) -> bytes:
        return event(ChatChunk(**self._head, object="chat.completion.chunk", **fields).to_json())

    def _token_ids(self, token_ids: tuple[int, ...]) -> dict[str, Any]:
        return {"token_ids": token_ids} if self._with_token_ids else {}

    def _chat_logprobs(self, output: Sequence[ScoredTokens]) -> ChatLogprobs | None:
        num_top = self._fields.num_top_logprobs
        return None if num_top is None else self._logprobs.chat(output, num_top=num_top)

    def _prompt_token_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._generation.prompt_token_ids(0)} if self._with_token_ids else {}


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
