"""The answers of `/api/chat` and `/api/generate`: one line of JSON, or one for each new piece."""

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from server.errors import ServiceError
from server.generation.choice import Answer, TextDelta
from server.generation.generation import Generation
from server.http.errors import error_json
from server.protocol.dialects.ollama import OllamaLine
from server.protocol.sampling import FinishReasonText
from server.service import Service
from server.text.reasoning import AnswerPart, ThoughtPart
from server.tools.tool_calls import ArgumentsPart, CallPart, TextPart

PATH = "/api/"


class OllamaWriter:
    """Writes lines with a `message`. Calls of tools come whole, as this dialect has no pieces of them."""

    media_type: str | None = "application/x-ndjson"
    keep_alive = b"\n"

    def __init__(self, service: Service, generation: Generation) -> None:
        self._generation = generation
        self._parser = generation.plan.answer_parser()
        self._model = generation.plan.fields.model or service.options.model_name
        self._begin = time.perf_counter_ns()
        self._first: int | None = None
        self._calls: list[dict[str, Any]] = []

    def whole(self, answers: Sequence[Answer]) -> OllamaLine:
        (answer,) = answers
        content, thought = self._take(answer.text, answer.finish_reason)
        return self._line(content, thought, answer.finish_reason)

    def begin(self) -> Sequence[bytes]:
        return []

    def delta(self, delta: TextDelta) -> Sequence[bytes]:
        self._first = time.perf_counter_ns() if self._first is None else self._first
        content, thought = self._take(delta.text, delta.finish_reason)
        lines = []
        if content or thought:
            lines.append(self._line(content, thought, None))
        if delta.finish_reason is not None:
            lines.append(self._line("", "", delta.finish_reason))
        return [line.to_json() + b"\n" for line in lines]

    def end(self) -> Sequence[bytes]:
        return []

    def failed(self, error: ServiceError) -> Sequence[bytes]:
        return [error_json(error, PATH) + b"\n"]

    def _take(self, text: str, reason: FinishReasonText | None) -> tuple[str, str]:
        """New text and new thought; calls are kept for the end."""
        parts: Sequence[AnswerPart] = self._parser.push(text, is_last=reason is not None, is_cut=reason == "length")
        for part in parts:
            if isinstance(part, CallPart):
                self._calls.append({"name": part.name, "arguments": ""})
            elif isinstance(part, ArgumentsPart):
                self._calls[-1]["arguments"] += part.text
        content = "".join(part.text for part in parts if isinstance(part, TextPart))
        return content, "".join(part.text for part in parts if isinstance(part, ThoughtPart))

    def _line(self, content: str, thought: str, reason: FinishReasonText | None) -> OllamaLine:
        calls = [] if reason is None else [{"function": {**call, "arguments": _value(call)}} for call in self._calls]
        message = {"role": "assistant", "content": content}
        more = ({"thinking": thought} if thought else {}) | ({"tool_calls": calls} if calls else {})
        return self._finished({"message": message | more}, reason)

    def _finished(self, said: dict[str, Any], reason: FinishReasonText | None) -> OllamaLine:
        end = {} if reason is None else self._statistics() | {"done_reason": reason}
        created = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        return OllamaLine(model=self._model, created_at=created, **said, done=reason is not None, **end)

    def _statistics(self) -> dict[str, int]:
        usage, now = self._generation.usage, time.perf_counter_ns()
        first = now if self._first is None else self._first
        return {
            "total_duration": now - self._begin,
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": first - self._begin,
            "eval_count": usage.completion_tokens,
            "eval_duration": now - first,
        }


class OllamaTextWriter(OllamaWriter):
    """Writes lines with a `response`."""

    def _line(self, content: str, thought: str, reason: FinishReasonText | None) -> OllamaLine:
        return self._finished({"response": content, **({"thinking": thought} if thought else {})}, reason)


def _value(call: dict[str, Any]) -> Any:
    try:
        value = json.loads(call["arguments"] or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": call["arguments"]}
