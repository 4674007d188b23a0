"""The answers of `POST /v1/messages`: blocks of thinking, text and tool use, whole or as typed events."""

import json
import uuid
from collections.abc import Sequence
from typing import Any

import orjson

from server.errors import ServiceError
from server.generation.choice import Answer, TextDelta
from server.generation.generation import Generation
from server.http.errors import anthropic_envelope
from server.http.sse import KEEP_ALIVE, event
from server.protocol.dialects.anthropic import AnthropicUsage, MessageOut, StopReason
from server.protocol.sampling import FinishReasonText
from server.service import Service
from server.text.reasoning import AnswerPart, ThoughtPart
from server.tools.tool_calls import CallPart, TextPart

Block = dict[str, Any]


class AnthropicWriter:
    """Writes `message` objects."""

    media_type: str | None = None
    keep_alive = KEEP_ALIVE

    def __init__(self, service: Service, generation: Generation) -> None:
        self._generation = generation
        self._parser = generation.plan.answer_parser()
        self._head: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": generation.plan.fields.model or service.options.model_name,
        }
        self._num_blocks = 0
        self._open: str | None = None

    def whole(self, answers: Sequence[Answer]) -> MessageOut:
        (answer,) = answers
        content: list[Block] = []
        for part in self._parts(answer.text, answer.finish_reason):
            kind, name, text = _described(part)
            if isinstance(part, CallPart) or not content or content[-1]["type"] != kind:
                content.append(_block(kind, name))
            content[-1][_GROWS[kind]] += text
        for block in content:
            if block["type"] == "tool_use":
                block["input"] = _value(block["input"])
        reason, stop = self._reason(answer.finish_reason, answer.stop)
        return MessageOut(
            **self._head, content=content, stop_reason=reason, stop_sequence=stop, usage=self._usage(), **_NULLS
        )

    def begin(self) -> Sequence[bytes]:
        usage = self._usage()
        message = MessageOut(**self._head, **_NULLS, content=[], stop_reason=None, stop_sequence=None, usage=usage)
        return [_event("message_start", message=message.model_dump()), _event("ping")]

    def delta(self, delta: TextDelta) -> Sequence[bytes]:
        events: list[bytes] = []
        for part in self._parts(delta.text, delta.finish_reason):
            kind, name, text = _described(part)
            if isinstance(part, CallPart) or self._open != kind:
                events += self._close()
                block = _block(kind, name)
                block |= {"input": {}} if kind == "tool_use" else {}
                events.append(_event("content_block_start", index=self._num_blocks, content_block=block))
                self._open = kind
            if text:
                name_of_delta, field = _DELTAS[kind]
                new = {"type": name_of_delta, field: text}
                events.append(_event("content_block_delta", index=self._num_blocks, delta=new))
        if delta.finish_reason is not None:
            events += self._close()
            reason, stop = self._reason(delta.finish_reason, delta.stop)
            end = {"stop_reason": reason, "stop_sequence": stop}
            events.append(_event("message_delta", delta=end, usage=self._usage().model_dump()))
        return events

    def end(self) -> Sequence[bytes]:
        return [_event("message_stop")]

    def failed(self, error: ServiceError) -> Sequence[bytes]:
        return [b"event: error\n" + event(orjson.dumps(anthropic_envelope(error)))]

    def _parts(self, text: str, reason: FinishReasonText | None) -> Sequence[AnswerPart]:
        return self._parser.push(text, is_last=reason is not None, is_cut=reason == "length")

    def _close(self) -> list[bytes]:
        if self._open is None:
            return []
        self._open = None
        self._num_blocks += 1
        return [_event("content_block_stop", index=self._num_blocks - 1)]

    def _reason(self, reason: FinishReasonText, stop: str | None) -> tuple[StopReason, str | None]:
        if reason == "length":
            return "max_tokens", None
        if self._parser.num_calls > 0:
            return "tool_use", None
        return ("end_turn", None) if stop is None else ("stop_sequence", stop)

    def _usage(self) -> AnthropicUsage:
        usage = self._generation.usage
        num_cached = usage.prompt_tokens_details.cached_tokens
        return AnthropicUsage(
            input_tokens=usage.prompt_tokens - num_cached,
            cache_creation_input_tokens=0,
            cache_read_input_tokens=num_cached,
            output_tokens=usage.completion_tokens,
            **_NO_COUNTS,
        )


_CALLER = {"caller": {"type": "direct"}}
_NULLS: dict[str, Any] = dict.fromkeys(("stop_details", "container"))
_NO_COUNTS: dict[str, Any] = dict.fromkeys(
    ("cache_creation", "inference_geo", "output_tokens_details", "server_tool_use", "service_tier")
)
_GROWS = {"thinking": "thinking", "text": "text", "tool_use": "input"}
_DELTAS = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool_use": ("input_json_delta", "partial_json"),
}


def _described(part: AnswerPart) -> tuple[str, str, str]:
    """The kind of the block that a part belongs to, the name of a tool, and the new text."""
    match part:
        case ThoughtPart(text):
            return "thinking", "", text
        case TextPart(text):
            return "text", "", text
        case CallPart(_, name):
            return "tool_use", name, ""
        case _:
            return "tool_use", "", part.text


def _block(kind: str, name: str) -> Block:
    """A block without its content."""
    match kind:
        case "thinking":
            return {"type": kind, "thinking": "", "signature": ""}
        case "text":
            return {"type": kind, "text": "", "citations": []}
        case _:
            return {"type": kind, "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": "", **_CALLER}


def _value(arguments: str) -> Any:
    """Arguments as a value; what the model wrote instead of an object stays visible as text."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}


def _event(name: str, **fields: Any) -> bytes:
    return b"event: " + name.encode() + b"\n" + event(orjson.dumps({"type": name, **fields}))
