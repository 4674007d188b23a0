"""Answering, whole or as a stream: what every generating route shares, and telling the log what it cost."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, TypeVar

import structlog
from fastapi import Request, Response

from server.errors import InternalError, ServiceError
from server.generation.choice import Answer, TextDelta
from server.generation.generation import Generation
from server.generation.logprobs import LogprobFormat, ScoredTokens
from server.generation.planning import Body, plan_request
from server.generation.sampling import deadline_of
from server.generation.sessions import find_past
from server.http.errors import error_json, on_wire
from server.http.sse import DONE, IN_TIME, KEEP_ALIVE, EventStreamResponse, event, unless_disconnected
from server.protocol.usage import Usage
from server.protocol.wire import ResponseModel, StateError
from server.service import Service
from server.tracing import current

logger = structlog.stdlib.get_logger("dijiang.answers")
MAX_INLINE_ENTRIES = 500
T = TypeVar("T")


def state_error(error: ServiceError) -> StateError:
    """What an answer says whose state could not be kept."""
    return StateError(code=on_wire(error).code, message=error.message)


class AnswerWriter(Protocol):
    """Puts deltas and answers of one generation into the shapes of a dialect.

    Attributes:
        media_type: of a stream; None: server-sent events.
        keep_alive: what a silent stream sends.
    """

    media_type: str | None
    keep_alive: bytes

    def whole(self, answers: Sequence[Answer]) -> ResponseModel:
        """The answer in one piece."""
        ...

    def begin(self) -> Sequence[bytes]:
        """The events before the first delta."""
        ...

    def delta(self, delta: TextDelta) -> Sequence[bytes]:
        """The events of a delta."""
        ...

    def end(self) -> Sequence[bytes]:
        """The events behind the last delta."""
        ...

    def failed(self, error: ServiceError) -> Sequence[bytes]:
        """The events of an error that comes after the 200."""
        ...


class OpenAIWriter:
    """What chat and completions write alike."""

    media_type: str | None = None
    keep_alive = KEEP_ALIVE

    def __init__(self, service: Service, generation: Generation) -> None:
        plan = generation.plan
        self._generation = generation
        self._fields = plan.fields
        self._logprobs: LogprobFormat = plan.logprob_format()
        self._with_token_ids = plan.fields.return_token_ids is True
        self._head: dict[str, Any] = {
            "created": int(time.time()),
            "model": plan.fields.model or service.options.model_name,
            "system_fingerprint": service.options.fingerprint,
        }

    def failed(self, error: ServiceError) -> Sequence[bytes]:
        """An error, and the mark of the end that clients wait for."""
        return [event(error_json(error)), DONE]

    def _prompt_logprobs(self, prompt: Sequence[ScoredTokens]) -> dict[str, Any]:
        num_top = self._fields.prompt_logprobs
        return {} if num_top is None else {"prompt_logprobs": self._logprobs.prompt(prompt, num_top=num_top)}

    def _state(self, end: TextDelta | Answer) -> dict[str, Any]:
        if end.state_error is not None:
            return {"state_id": None, "state_error": state_error(end.state_error)}
        return {} if end.state_id is None else {"state_id": end.state_id}

    def _usage(self) -> dict[str, Any]:
        """Of a chunk that is not the last."""
        if not self._fields.wants_usage:
            return {}
        return {"usage": self._generation.usage_handed_out if self._fields.wants_usage_in_every_chunk else None}


async def answer(
    request: Request, service: Service, body: Body, write: Callable[[Service, Generation], AnswerWriter]
) -> Response:
    """Plans a request, generates, and answers, whole or as a stream.

    Args:
        write: makes the writer of the dialect.

    Raises:
        ServiceError: before the first byte.
    """
    generation = await unless_disconnected(request.receive, started(service, owner_of(request), body))
    writer = write(service, generation)
    end = partial(close, request, service, generation)
    if body.stream:
        chunks = _chunks(writer, generation, idle_s=IN_TIME * service.options.keepalive_s)
        return EventStreamResponse(chunks, close=end, media_type=writer.media_type)
    answers = await collected(request, generation.collect(), close=end)
    num_entries = sum(whole.num_entries for whole in answers)
    return await written(lambda: json_response(writer.whole(answers)), num_entries=num_entries)


async def started(service: Service, owner: str, body: Body) -> Generation:
    """A generation that the engine has taken.

    Raises:
        ServiceError: the request can never work, or not now.
    """
    deadline = deadline_of(body, service.options)
    info = service.admit(owner, body.model)
    async with deadline.kept():
        with current().measured("store", operation="find"):
            past = await find_past(service, info, owner, body)
        plan = await plan_request(service, info, owner, body, past, deadline=deadline)
    generation = Generation(service, plan)
    await generation.start()
    return generation


def owner_of(request: Request) -> str:
    """Whose states a request may see."""
    owner: str = request.state.owner
    return owner


def json_response(answer: ResponseModel) -> Response:
    """A whole answer."""
    return Response(answer.to_json(), media_type="application/json")


async def collected(request: Request, work: Awaitable[T], *, close: Callable[[], Awaitable[None]]) -> T:
    """The result of generating, and whatever is behind it closed.

    Raises:
        ServiceError: the generation failed.
        ClientDisconnectedError: the client left first.
    """
    try:
        return await unless_disconnected(request.receive, work)
    finally:
        await close()


async def written(write: Callable[[], T], *, num_entries: int) -> T:
    """What `write` returns; in a thread if it has many log-probabilities to write, so that the event loop goes on."""
    return write() if num_entries <= MAX_INLINE_ENTRIES else await asyncio.to_thread(write)


async def close(request: Request, service: Service, generation: Generation) -> None:
    """Frees the slots, and puts the token counts into the request's log line and onto its key's bill."""
    await generation.close()
    usage = generation.usage
    service.rate_limits.charge(generation.plan.owner, charged_tokens(usage))
    request.state.facts.update(generation.log_facts)


def charged_tokens(usage: Usage) -> int:
    """What counts against a key's tokens a minute: all but what was not computed again."""
    return usage.total_tokens - usage.prompt_tokens_details.cached_tokens


async def _chunks(writer: AnswerWriter, generation: Generation, *, idle_s: float) -> AsyncGenerator[bytes, None]:
    """The events of a stream; after the 200 an error is one of them."""
    try:
        for chunk in writer.begin():
            yield chunk
        async with aclosing(generation.deltas(idle_s=idle_s)) as deltas:
            async for delta in deltas:
                if delta is None:
                    yield writer.keep_alive
                    continue
                for chunk in await written(partial(writer.delta, delta), num_entries=delta.num_entries):
                    yield chunk
        for chunk in writer.end():
            yield chunk
    except ServiceError as error:
        generation.error_code = on_wire(error).code
        for chunk in writer.failed(error):
            yield chunk
    except Exception:
        logger.exception("a stream failed")
        generation.error_code = on_wire(InternalError()).code
        for chunk in writer.failed(InternalError()):
            yield chunk
