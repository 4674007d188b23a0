"""The output of a response: its items while the text grows, and the events that tell of them.

Everything that a stream says can be said again later: `replayed` makes the same events of the finished items and of the
lengths of the pieces in which they came.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.generation.tools import new_call_id
from server.protocol.sampling import FinishReasonText
from server.text.reasoning import AnswerParser, ThoughtPart
from server.tools.tool_calls import ArgumentsPart, CallPart, TextPart

Item = dict[str, Any]
Event = tuple[str, dict[str, Any]]
"""Name and fields, without the sequence number."""
Logprobs = list[dict[str, Any]]
IN_PROGRESS, COMPLETED, INCOMPLETE = "in_progress", "completed", "incomplete"


@dataclass(slots=True)
class Pieces:
    """In which pieces the output came.

    Attributes:
        characters: in each delta, in order.
        logprobs: log-probabilities in each delta; empty if there are none at all.
    """

    characters: list[int] = field(default_factory=list)
    logprobs: list[int] = field(default_factory=list)


class ResponseOutput:
    """See the module.

    Attributes:
        items: as they are now; the last one may still grow.
        pieces: of them, so far.
    """

    def __init__(self, parser: AnswerParser, *, with_logprobs: bool) -> None:
        """
        Args:
            parser: takes the text apart.
            with_logprobs: whether messages carry log-probabilities.
        """
        self.items: list[Item] = []
        self.pieces = Pieces()
        self._parser = parser
        self._with_logprobs = with_logprobs
        self._pending: Logprobs = []
        self._is_open = False

    def begin(self) -> list[Event]:
        """Before the first text. Where nothing is thought or called, there is a message from the start."""
        return self._open(_new_message()) if self._parser.is_plain else []

    def push(self, text: str, logprobs: Logprobs, reason: FinishReasonText | None = None) -> list[Event]:
        """Takes more text, and the log-probabilities of its tokens; `reason`: why it ends, if it does."""
        self._pending += logprobs
        events: list[Event] = []
        for part in self._parser.push(text, is_last=reason is not None, is_cut=reason == "length"):
            match part:
                case ThoughtPart(new):
                    events += self._thought(new)
                case TextPart(new):
                    events += self._text(new)
                case CallPart(_, name):
                    self._pending = []  # of the tokens around the call
                    events += self._open(_new_call(name))
                case ArgumentsPart(_, new):
                    self._pending = []
                    self.items[-1]["arguments"] += new
                    events.append(self._delta(new, []))
        return events

    def finish(self, reason: FinishReasonText) -> list[Event]:
        """After the last text."""
        is_empty = not self.items and not self._parser.is_forced
        events: list[Event] = self._open(_new_message()) if is_empty else []
        if self._is_open and self._pending and self.items[-1]["type"] == "message":
            self.items[-1]["content"][0]["logprobs"] += self._pending  # of the token that ended it
        return events + self._close(COMPLETED if reason == "stop" else INCOMPLETE)

    def suspend(self) -> dict[str, Any]:
        """What `resume` needs, fit for JSON: it is cut off here and goes on later."""
        return {"items": self.items, "pending": self._pending}

    def resume(self, text: str, before: Mapping[str, Any], pieces: Pieces) -> None:
        """Goes on where it was suspended; `text` is all that was pushed until then."""
        self.begin()
        self.push(text, [])
        if before["items"]:
            self.items, self._pending, self.pieces = before["items"], before["pending"], pieces

    def break_off(self) -> None:
        """Instead of `finish`, where the answer fails: the last item stays as it is."""
        if self._is_open:
            self.items[-1]["status"] = INCOMPLETE

    def _thought(self, new: str) -> list[Event]:
        self._pending = []  # log-probabilities are those of messages
        events = [] if self._is_open else self._open(_new_thought())
        self.items[-1]["content"][0]["text"] += new
        return [*events, self._delta(new, [])]

    def _text(self, new: str) -> list[Event]:
        events: list[Event] = []
        if not self._is_open or self.items[-1]["type"] != "message":
            events += self._open(_new_message())
        logprobs, self._pending = self._pending, []
        part = self.items[-1]["content"][0]
        part["text"] += new
        part["logprobs"] += logprobs
        return [*events, self._delta(new, logprobs)]

    def _delta(self, new: str, logprobs: Logprobs) -> Event:
        self.pieces.characters.append(len(new))
        if self._with_logprobs:
            self.pieces.logprobs.append(len(logprobs))
        return _delta(self.items[-1], len(self.items) - 1, new, logprobs)

    def _open(self, item: Item) -> list[Event]:
        events = self._close(COMPLETED)
        self.items.append(item)
        self._is_open = True
        return events + _opened(item, len(self.items) - 1)

    def _close(self, status: str) -> list[Event]:
        if not self._is_open:
            return []
        self._is_open = False
        self.items[-1]["status"] = status
        return _closed(self.items[-1], len(self.items) - 1)


def replayed(items: Sequence[Item], pieces: Pieces, *, was_broken_off: bool) -> Iterator[Event]:
    """The events that told of finished items.

    Args:
        items: of a response.
        pieces: in which they came.
        was_broken_off: whether the response failed, was cancelled or goes on: an item that is not whole was not closed.
    """
    lengths, counts = iter(pieces.characters), iter(pieces.logprobs)
    for index, item in enumerate(items):
        has_parts = item["type"] != "function_call"
        yield from _opened({**item, "status": IN_PROGRESS, **({} if has_parts else {"arguments": ""})}, index)
        text, logprobs = _said(item)
        while text:
            length, count = next(lengths, len(text)), next(counts, 0)
            yield _delta(item, index, text[:length], logprobs[:count])
            text, logprobs = text[length:], logprobs[count:]
        if not (was_broken_off and item["status"] in (INCOMPLETE, IN_PROGRESS)):
            yield from _closed(item, index)


def _said(item: Mapping[str, Any]) -> tuple[str, Logprobs]:
    if item["type"] == "function_call":
        return item["arguments"], []
    part = item["content"][0]
    return part["text"], part.get("logprobs", [])


def _new_message() -> Item:
    content = [_text_part("", [])]
    return {"id": _id("msg"), "type": "message", "status": IN_PROGRESS, "role": "assistant", "content": content}


def _new_thought() -> Item:
    content = [_thought_part("")]
    return {"id": _id("rs"), "type": "reasoning", "status": IN_PROGRESS, "summary": [], "content": content}


def _new_call(name: str) -> Item:
    item = {"id": _id("fc"), "type": "function_call", "status": IN_PROGRESS, "call_id": new_call_id()}
    return {**item, "name": name, "arguments": ""}


def _text_part(text: str, logprobs: Logprobs) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _thought_part(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _opened(item: Item, index: int) -> list[Event]:
    if item["type"] == "function_call":
        return [("response.output_item.added", {"output_index": index, "item": dict(item)})]
    part = _text_part("", []) if item["type"] == "message" else _thought_part("")
    return [
        ("response.output_item.added", {"output_index": index, "item": {**item, "content": []}}),
        ("response.content_part.added", {**_place(item, index), "content_index": 0, "part": part}),
    ]


def _delta(item: Item, index: int, new: str, logprobs: Logprobs) -> Event:
    place = _place(item, index)
    match item["type"]:
        case "function_call":
            return ("response.function_call_arguments.delta", {**place, "delta": new})
        case "reasoning":
            return ("response.reasoning_text.delta", {**place, "content_index": 0, "delta": new})
        case _:
            more = {"content_index": 0, "delta": new, "logprobs": logprobs}
            return ("response.output_text.delta", {**place, **more})


def _closed(item: Item, index: int) -> list[Event]:
    place = _place(item, index)
    done: Event = ("response.output_item.done", {"output_index": index, "item": item})
    if item["type"] == "function_call":
        more = {"name": item["name"], "arguments": item["arguments"]}
        return [("response.function_call_arguments.done", {**place, **more}), done]
    text, logprobs = _said(item)
    place["content_index"] = 0
    if item["type"] == "reasoning":
        said: Event = ("response.reasoning_text.done", {**place, "text": text})
        part = _thought_part(text)
    else:
        said = ("response.output_text.done", {**place, "text": text, "logprobs": logprobs})
        part = _text_part(text, logprobs)
    return [said, ("response.content_part.done", {**place, "part": part}), done]


def _place(item: Item, index: int) -> dict[str, Any]:
    return {"item_id": item["id"], "output_index": index}


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
