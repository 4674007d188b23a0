"""What both generating routes share: answering whole or as a stream, and telling the log what it cost."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

import structlog
from fastapi import Request, Response

from server.errors import ApiError, InternalError
from server.generation.choice import Answer
from server.generation.generation import Generation
from server.generation.sessions import owner_of
from server.http.sse import DONE, EventStreamResponse, event, unless_disconnected
from server.protocol.usage import Usage
from server.protocol.wire import ResponseModel
from server.service import Service

logger = structlog.stdlib.get_logger("dijiang.answers")
CLIENT_CLOSED_REQUEST = 499
MAX_INLINE_ENTRIES = 500
T = TypeVar("T")


class ClientGoneResponse(Response):
    """For the log only: nobody reads it."""

    def __init__(self) -> None:
        super().__init__(status_code=CLIENT_CLOSED_REQUEST)


def json_response(answer: ResponseModel) -> Response:
    """A whole answer."""
    return Response(answer.to_json(), media_type="application/json")


async def written_response(write: Callable[[], ResponseModel], answers: Sequence[Answer]) -> Response:
    """A whole answer."""
    return await written(lambda: json_response(write()), num_entries=sum(answer.num_entries for answer in answers))


async def written(write: Callable[[], T], *, num_entries: int) -> T:
    """What `write` returns; in a thread if it has many log-probabilities to write, so that the event loop goes on."""
    return write() if num_entries <= MAX_INLINE_ENTRIES else await asyncio.to_thread(write)


async def collect_answers(request: Request, generation: Generation) -> list[Answer]:
    """All answers of an admitted generation; its slots are free afterwards.

    Raises:
        ApiError: the generation failed.
        ClientDisconnectedError: the client left first.
    """
    try:
        return await unless_disconnected(request.receive, generation.collect())
    finally:
        await generation.close()
        note_usage(request, generation)


def stream_answers(request: Request, generation: Generation, chunks: AsyncGenerator[bytes, None]) -> Response:
    """An admitted generation as server-sent events; its slots are free when the response has ended."""

    async def close() -> None:
        await generation.close()
        note_usage(request, generation)

    return EventStreamResponse(_guarded(chunks), close=close)


def note_usage(request: Request, generation: Generation) -> None:
    """Puts the token counts into the request's log line, and onto its key's bill."""
    usage = generation.usage
    service: Service = request.app.state.service
    service.rate_limits.charge(owner_of(request, service), charged_tokens(usage))
    request.state.facts.update(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)


def charged_tokens(usage: Usage) -> int:
    """What counts against a key's tokens a minute: all but what was not computed again."""
    return usage.total_tokens - usage.prompt_tokens_details.cached_tokens


async def _guarded(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """After the 200 an error is an event, and `[DONE]` still comes."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk
    except ApiError as error:
        yield event(error.to_json())
    except Exception:
        logger.exception("a stream failed")
        yield event(InternalError().to_json())
    yield DONE
