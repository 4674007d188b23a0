"""One response of the Responses API while it is made: its object, its events, and how it is kept."""

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import structlog

from server.errors import InternalError, ServiceError, ShutdownError
from server.event_log import EventLog
from server.generation.choice import TextDelta
from server.generation.generation import Generation
from server.generation.logprobs import LogprobFormat, check_num_entries
from server.generation.streaming import state_error
from server.http.errors import on_wire
from server.http.sse import IN_TIME, KEEP_ALIVE
from server.protocol.logprobs import ChatLogprobs
from server.protocol.response_items import stored_item
from server.protocol.responses import ResponseRequest, response_usage
from server.responses.conversations import OpenConversation, stored_items
from server.responses.events import begun, encoded, ended, resumed, suspended, with_pieces
from server.responses.once import IdempotencyKey
from server.responses.output import Event, Item, Logprobs, Pieces, ResponseOutput
from server.responses.suspended import Unfinished
from server.service import Service
from server.states.errors import StorageFullError, StoreUnavailableError
from server.states.store import ResponseRecord, SnapshotRecord, StateStore

logger = structlog.stdlib.get_logger("dijiang.responses")
RETRY_S = 0.5
MAX_FAILURES = 1
"""Engines that may fail under a response in the background before it has failed: it may be its fault."""
_TEXT_FORMAT = {"type": "text"}


def _new(source: str, seed: int | None) -> Unfinished:
    return Unfinished(source, secrets.randbits(63) if seed is None else seed)


class ResponseRun:
    """See the module.

    Attributes:
        id: `resp_...`, not to be guessed.
        generation: what makes it; set before anything else is asked for.
        output: its items; likewise.
        logprobs: how log-probabilities are written; None: they are not wanted.
        log: of its events, while it is made in the background.
        unfinished: what is known of it beside its output, and what it was when it was suspended, if it was.
        snapshot: its conversation, where it was saved last.
        conversation: that it answers and extends; None: none.
    """

    generation: Generation
    output: ResponseOutput
    logprobs: LogprobFormat | None = None

    def __init__(
        self,
        service: Service,
        body: ResponseRequest,
        *,
        owner: str,
        store: StateStore | None,
        ttl_s: float | None,
        source: str,
        before: ResponseRecord | None = None,
        once: IdempotencyKey | None = None,
    ) -> None:
        """
        Args:
            store: where it is kept; None: it is not.
            ttl_s: how long, without use.
            source: the request as it came, JSON.
            before: what was stored of it when it was suspended, or its server ended; None: it begins here.
            once: so that the same request, sent again, is the same response; None: it is another one.
        """
        new_id = f"resp_{uuid.uuid4().hex}" if once is None else once.response_id
        self.id = new_id if before is None else before.id
        self.owner = owner
        self.log = EventLog()
        self.unfinished = _new(source, body.seed) if before is None else Unfinished.of(before.body)
        self._service = service
        self._body = body
        self._store = store
        self._ttl_s = ttl_s
        self._created = time.time() if before is None else before.created
        self._is_resumed = before is not None
        self._hidden: dict[str, Any] = {} if once is None else once.stored()
        self.snapshot: SnapshotRecord | None = None
        if before is not None and before.snapshot is not None and before.snapshot.file == self.unfinished.resumes_at:
            self.snapshot = before.snapshot
        self._is_left = self._is_begun_anew = False
        self._num_entries = 0
        self._status = "incomplete"
        self._incomplete_for = "max_output_tokens"
        self._response: dict[str, Any] = {}
        self._state_error: ServiceError | None = None
        self.conversation: OpenConversation | None = None

    async def keep_state(self, snapshot: SnapshotRecord) -> str:
        """Keeps the conversation at the answer's end, at once, so that nobody removes it."""
        self.snapshot = snapshot
        await self.put(self.object("in_progress"))
        return self.id

    def resume(self) -> None:
        """Brings a response that was suspended to where it was then; its generation is planned, and not started yet."""
        before = self.unfinished
        text = self.generation.resume(before.token_ids, num_cached_tokens=before.num_cached_tokens)
        self.output.resume(text, before.output, before.pieces)
        for told in resumed(self.object("in_progress"), self.output.items, self.output.pieces):
            self.log.append(encoded(self.log.num_events, told))

    async def suspend(self) -> None:
        """Keeps all that is needed to go on with it, at whatever server takes it up."""
        usage = self.generation.usage.prompt_tokens_details.cached_tokens - self.unfinished.num_past_cached_tokens
        unfinished = replace(
            self.unfinished,
            prompt_token_ids=self.generation.prompt_token_ids(0),
            token_ids=tuple(self.generation.token_ids),
            num_cached_tokens=usage,
            output=self.output.suspend(),
            resumes_at=None if self.snapshot is None else self.snapshot.file,
        )
        await self.put({**self.object("queued"), **unfinished.stored()})

    async def begin(self) -> bool:
        """Keeps the response before there is anything of it; false if it is there already."""
        if self._store is None:
            return True
        return await self._store.begin_response(self._record(self.object("in_progress")))

    async def put(self, response: Mapping[str, Any]) -> None:
        """Keeps the response as it is now, if it is to be kept; in the background until that works.

        Raises:
            StorageFullError: there is no room.
            StoreUnavailableError: the store is away; not in the background, where nobody waits.
        """
        while self._store is not None:
            try:
                await self._store.put_response(self._record(response))
            except StoreUnavailableError:
                if not self._body.background or self._service.status != "ok":
                    raise
                await asyncio.sleep(RETRY_S)
            else:
                return

    def _record(self, response: Mapping[str, Any]) -> ResponseRecord:
        suffix = self.id.removeprefix("resp_")
        items = [stored_item(item, number, suffix) for number, item in enumerate(self._body.input)]
        if self._body.background and (response["status"] == "in_progress" or self._is_begun_anew):
            anew = self.unfinished.anew(self.generation.prompt_token_ids(0))
            body = {**with_pieces(response, Pieces()), **anew.stored()}
        else:
            body = with_pieces(response, self.output.pieces)
        info = self._service.engine.info
        return ResponseRecord(
            self.id,
            self.owner,
            self._created,
            self._ttl_s,
            {**body, **self._hidden},
            tuple(items),
            self.snapshot,
            fingerprint="" if info is None or info.state_layout is None else info.state_layout.fingerprint,
        )

    async def whole(self) -> dict[str, Any]:
        """The whole response, kept.

        Raises:
            ServiceError: it could not be made.
        """
        async with aclosing(self._events()) as events:
            async for _ in events:
                pass
        return self._response

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The typed events, from `response.created` to `response.completed`, `.incomplete` or `.failed`."""
        number = 0
        async with aclosing(self._events_safely()) as events:
            async for told in events:
                yield KEEP_ALIVE if told is None else encoded(number, told)
                number += told is not None

    async def in_background(self) -> None:
        """Makes the response while nobody waits; its end is kept, whatever it is."""
        try:
            async with aclosing(self._events_safely()) as events:
                async for told in events:
                    if told is not None:
                        self.log.append(encoded(self.log.num_events, told))
        except ShutdownError:
            self.log.append(encoded(*suspended(self.log.num_events)))
        except asyncio.CancelledError:
            if self._service.is_closing:
                self._is_left = True  # nobody has asked for that: another server makes it
                raise
            self.output.break_off()
            response = self.object("cancelled", with_output=True)
            self.log.append(encoded(self.log.num_events, ended(response)))
            await asyncio.shield(self.put(response))
        finally:
            self.log.end()
            await self.generation.close()
            await self.ended()

    async def ended(self) -> None:
        """To be called in every case: what is kept as in progress then has failed, unless others go on with it."""
        if self._store is not None and not self._is_left:
            await self._store.end_response(self.id)

    def object(
        self,
        status: str,
        *,
        with_output: bool = False,
        error: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The response object of OpenAI's API."""
        body = self._body
        text_format = _TEXT_FORMAT if body.text is None or body.text.format is None else body.text.format
        output: list[Item] = self.output.items if with_output else []
        choice = body.tool_choice
        return {
            "id": self.id,
            "object": "response",
            "created_at": int(self._created),
            "status": status,
            "background": body.background is True,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": error,
            "incomplete_details": {"reason": self._incomplete_for} if status == "incomplete" else None,
            "instructions": body.instructions,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": {} if body.metadata is None else body.metadata,
            "model": body.model or self._service.options.model_name,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "presence_penalty": body.presence_penalty or 0.0,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": body.reasoning_effort, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": self._store is not None,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": text_format},
            "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
            "tools": body.echoed_tools,
            "top_logprobs": 0 if body.top_logprobs is None else body.top_logprobs,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled" if body.truncation is None else body.truncation,
            "usage": response_usage(self.generation.usage) if status in ("completed", "incomplete") else None,
            "user": body.user,
            **({} if body.conversation is None else {"conversation": {"id": body.conversation}}),
        }

    async def _events_safely(self) -> AsyncGenerator[Event | None, None]:
        """Like `_events`; what goes wrong is the last event."""
        try:
            async with aclosing(self._events()) as events:
                async for told in events:
                    yield told
        except ServiceError as error:
            if isinstance(error, ShutdownError) and self._body.background:
                await self._suspend_if_possible()
                raise
            if await self._waits_for_next_engine(error):
                raise ShutdownError([]) from error
            yield ended(await self._failed(error))
        except Exception:
            logger.exception("a response failed")
            yield ended(await self._failed(InternalError()))

    async def _events(self) -> AsyncGenerator[Event | None, None]:
        """The events of a response that goes well, which is kept before the last one; None: nothing new for a while."""
        if not self._is_resumed:
            for told in (*begun(self.object("in_progress")), *self.output.begin()):
                yield told
        try:
            async for delta in self.generation.deltas(idle_s=IN_TIME * self._service.options.keepalive_s):
                if delta is None:
                    yield None
                    continue
                for told in self._take(delta):
                    yield told
        except ShutdownError:
            if self._body.background or self.generation.usage.completion_tokens == 0:
                raise
            self._incomplete_for = "server_shutdown"
            for told in self.output.finish("length"):
                yield told
        self._response = self.object(self._status, with_output=True)
        try:
            await self.put(self._response)
            await self._extend()
        except (StoreUnavailableError, StorageFullError) as error:
            if self._body.background:
                raise
            self._state_error = error
        if self._state_error is not None:  # the answer is worth something without its being kept, too
            logger.error("a response could not be kept", id=self.id, problem=str(self._state_error))
            self._response |= {"state_error": state_error(self._state_error).model_dump()}
        yield ended(self._response)

    async def _extend(self) -> None:
        """Adds what was asked and answered to the conversation."""
        if self.conversation is not None:
            items = [*stored_items(self._body.input), *self._response["output"]]
            is_kept = self._store is not None and self.snapshot is not None
            read_by, instructions = self.id if is_kept else None, self._body.instructions
            await self.conversation.extend(items, response_id=read_by, instructions=instructions)

    def _take(self, delta: TextDelta) -> list[Event]:
        events = self.output.push(delta.text, self._logprobs_of(delta), delta.finish_reason)
        if delta.finish_reason is not None:
            self._state_error = delta.state_error
            self._status = "completed" if delta.finish_reason == "stop" else "incomplete"
            events += self.output.finish(delta.finish_reason)
        return events

    def _logprobs_of(self, delta: TextDelta) -> Logprobs:
        if self.logprobs is None or delta.output is None:
            return []
        self._num_entries += delta.num_entries
        check_num_entries(self._num_entries)
        num_top = 0 if self._body.top_logprobs is None else self._body.top_logprobs
        written: ChatLogprobs = self.logprobs.chat([delta.output], num_top=num_top)
        return [entry.model_dump() for entry in written.content]

    async def _suspend_if_possible(self) -> None:
        try:
            await self.suspend()
        except ServiceError as error:
            logger.error("a background response is made anew: how far it was could not be saved", problem=str(error))
            self._is_left = True

    async def _waits_for_next_engine(self, error: ServiceError) -> bool:
        """Lets a response in the background whose engine has failed be made anew, to the same text; once."""
        if error.code != "engine_restarting" or not self._body.background or self._store is None:
            return False
        if self.unfinished.num_failures >= MAX_FAILURES:
            return False
        self.unfinished = replace(self.unfinished, num_failures=self.unfinished.num_failures + 1)
        self._is_begun_anew = True
        await self._suspend_if_possible()
        return True

    async def _failed(self, error: ServiceError) -> dict[str, Any]:
        """The response that could not be made, kept."""
        self.output.break_off()
        code = on_wire(error).code or "server_error"
        self.generation.error_code, told = code, {"code": code, "message": error.message}
        response = self.object("failed", with_output=True, error=told)
        for kept in (response, self.object("failed", error=told)):  # without its text there is always room for it
            try:
                await self.put(kept)
            except StorageFullError:
                continue
            except StoreUnavailableError:
                logger.error("a response that failed could not be kept", id=self.id)
            break
        return response
