"""One response of the Responses API while it is made: its object, its events, and how it is kept."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import orjson
import structlog

from server.errors import ApiError, InternalError
from server.protocol.responses import ResponseRequest, response_usage
from server.routes.answers import Answer, Generation
from server.service import Service
from server.sse import KEEP_ALIVE, event
from server.states.store import ResponseRecord, SnapshotRecord, StateStore

logger = structlog.stdlib.get_logger("dijiang.responses")
_TEXT_FORMAT = {"type": "text"}


class ResponseRun:
    """See the module.

    Attributes:
        id: `resp_...`, not to be guessed.
        generation: what makes it; set before anything else is asked for.
    """

    generation: Generation

    def __init__(
        self, service: Service, body: ResponseRequest, *, owner: str, store: StateStore | None, ttl_s: float | None
    ) -> None:
        """
        Args:
            store: where it is kept; None: it is not.
            ttl_s: how long, without use.
        """
        self.id = f"resp_{uuid.uuid4().hex}"
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._service = service
        self._body = body
        self._owner = owner
        self._store = store
        self._ttl_s = ttl_s
        self._created = time.time()
        self._snapshot: SnapshotRecord | None = None
        self._sequence_number = 0

    async def keep_state(self, snapshot: SnapshotRecord) -> str:
        """Keeps the conversation at the answer's end, at once, so that nobody removes it."""
        self._snapshot = snapshot
        await self.put(self.object("in_progress"))
        return self.id

    async def put(self, response: Mapping[str, Any]) -> None:
        """Keeps the response as it is now, if it is to be kept."""
        if self._store is None:
            return
        items = [
            {
                "id": f"msg_{self.id.removeprefix('resp_')}_{number}",
                "type": "message",
                "status": "completed",
                "role": item.role,
                "content": [{"type": _part_type(item.role), "text": item.content}],
            }
            for number, item in enumerate(self._body.input)
        ]
        await self._store.put_response(
            ResponseRecord(self.id, self._owner, self._created, self._ttl_s, response, tuple(items), self._snapshot)
        )

    async def finished(self, answer: Answer) -> dict[str, Any]:
        """The whole response, kept."""
        status = "completed" if answer.finish_reason == "stop" else "incomplete"
        response = self.object(status, output=[self._item(status, answer.text)], with_usage=True)
        await self.put(response)
        return response

    async def failed(self, error: ApiError) -> dict[str, Any]:
        """The response that could not be made, kept."""
        response = self.object("failed", error={"code": error.code or "server_error", "message": error.message})
        await self.put(response)
        return response

    def object(
        self,
        status: str,
        *,
        output: list[dict[str, Any]] | None = None,
        error: dict[str, Any] | None = None,
        with_usage: bool = False,
    ) -> dict[str, Any]:
        """The response object of OpenAI's API."""
        body = self._body
        text_format = _TEXT_FORMAT if body.text is None or body.text.format is None else body.text.format
        return {
            "id": self.id,
            "object": "response",
            "created_at": int(self._created),
            "status": status,
            "background": body.background is True,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {} if body.metadata is None else body.metadata,
            "model": self._service.options.model_name,
            "output": [] if output is None else output,
            "parallel_tool_calls": True if body.parallel_tool_calls is None else body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": self._store is not None,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": text_format},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled" if body.truncation is None else body.truncation,
            "usage": response_usage(self.generation.usage) if with_usage else None,
            "user": body.user,
        }

    async def in_background(self) -> None:
        """Makes the response while nobody waits; its end is kept, whatever it is."""
        try:
            (answer,) = await self.generation.collect()
            await self.finished(answer)
        except asyncio.CancelledError:
            await asyncio.shield(self.put(self.object("cancelled")))
        except ApiError as error:
            await self.failed(error)
        except Exception:
            logger.exception("a response failed")
            await self.failed(InternalError())
        finally:
            await self.generation.close()
            await self.ended()

    async def ended(self) -> None:
        """To be called in every case: what is kept as in progress then has failed."""
        if self._store is not None:
            await self._store.end_response(self.id)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The typed events, from `response.created` to `response.completed`, `.incomplete` or `.failed`."""
        text, answer = "", Answer()
        try:
            for name in ("response.created", "response.in_progress"):
                yield self._event(name, response=self.object("in_progress"))
            yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", None))
            yield self._part_event("response.content_part.added", part=_part(""))
            async for piece in self.generation.pieces(idle_s=self._service.options.keepalive_s):
                if piece is None:
                    yield KEEP_ALIVE
                    continue
                if piece.text:
                    text += piece.text
                    yield self._part_event("response.output_text.delta", delta=piece.text, logprobs=[])
                if piece.finish_reason is not None:
                    answer = Answer(text=text, finish_reason=piece.finish_reason)
            response = await self.finished(answer)
        except ApiError as error:
            yield self._event("response.failed", response=await self.failed(error))
            return
        except Exception:
            logger.exception("a response failed")
            yield self._event("response.failed", response=await self.failed(InternalError()))
            return
        for chunk in self._last_events(text, response):
            yield chunk

    def _last_events(self, text: str, response: Mapping[str, Any]) -> list[bytes]:
        return [
            self._part_event("response.output_text.done", text=text, logprobs=[]),
            self._part_event("response.content_part.done", part=_part(text)),
            self._event("response.output_item.done", output_index=0, item=response["output"][0]),
            self._event(f"response.{response['status']}", response=response),
        ]

    def _part_event(self, name: str, **fields: Any) -> bytes:
        return self._event(name, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _event(self, name: str, **fields: Any) -> bytes:
        data = {"type": name, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return b"event: " + name.encode() + b"\n" + event(orjson.dumps(data))

    def _item(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _part_type(role: str) -> str:
    return "output_text" if role == "assistant" else "input_text"
