"""`/v1/responses`: answers that are kept, and gone on from at the price of what is new."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from server.api.json_body import JsonRoute, ServiceDependency
from server.errors import InvalidRequestError, NotFoundError
from server.event_log import EventLog
from server.generation.sampling import deadline_of
from server.generation.sessions import require_store, time_to_live
from server.generation.streaming import close, collected, owner_of
from server.http.sse import IN_TIME, KEEP_ALIVE, EventStreamResponse, unless_disconnected
from server.protocol.response_items import page_of_items
from server.protocol.responses import ResponseRequest
from server.responses.background import make_in_background
from server.responses.conversations import PREFIX
from server.responses.events import public, reported_later
from server.responses.once import IdempotencyKey
from server.responses.plan import plan_response
from server.responses.run import ResponseRun
from server.service import Service
from server.states.errors import response_not_found
from server.states.store import ResponseRecord, StateStore

POLL_S = 0.5
router = APIRouter(route_class=JsonRoute, prefix="/v1/responses", tags=["responses"])


@router.post("", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})
async def create_response(body: ResponseRequest, request: Request, service: ServiceDependency) -> Response:
    """Answers an input, alone or after an earlier response; with an `Idempotency-Key` the same request only once."""
    deadline = deadline_of(body, service.options)
    owner, source = owner_of(request), await request.body()
    once = IdempotencyKey.of(request.headers, owner=owner, source=source)
    async with deadline.kept():
        if once is not None and (earlier := await _earlier(service, body, owner, once)) is not None:
            return earlier
        info = service.admit(owner, body.model)
        run = _run(service, body, owner, source=source.decode(), once=once)
        planning = plan_response(service, info, body, run, deadline=deadline)
        generation = await unless_disconnected(request.receive, planning)
    await generation.start()

    async def end() -> None:
        await close(request, service, generation)
        await run.ended()

    if body.background or once is not None:
        try:
            is_new = await run.begin()
        except BaseException:
            await end()
            raise
        if not is_new and once is not None:  # it came a second time meanwhile
            await close(request, service, generation)
            return await _repeated(service, body, owner, once.response_id)
    if body.background:
        make_in_background(service, run)
        response = run.object("in_progress")
        return _follow(service, run.log, 0) if body.stream else JSONResponse(response | {"status": "queued"})
    if body.stream:
        return EventStreamResponse(run.events(), close=end)
    return JSONResponse(await collected(request, run.whole(), close=end))


@router.post("/compact")
@router.post("/input_tokens")
async def not_here() -> JSONResponse:
    """Endpoints of OpenAI that are not built: a conversation needs no compacting, and `/tokenize` counts."""
    raise NotFoundError("this server has no such endpoint", code="unknown_route")


@router.get("/{response_id}", response_class=Response)
async def get_response(
    response_id: str,
    request: Request,
    service: ServiceDependency,
    stream: Annotated[bool, Query()] = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
) -> Response:
    """A stored response; with `stream` its events after number `starting_after`, as they were or as they come."""
    if starting_after is not None and not stream:
        raise InvalidRequestError("`starting_after` needs `stream`", param="starting_after", code="invalid_value")
    store, owner = require_store(service, param=None), owner_of(request)
    record = await _stored(store, owner, response_id)
    if not stream:
        return JSONResponse(public(record.body))
    return _events(service, owner, response_id, 0 if starting_after is None else starting_after + 1)


@router.get("/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    request: Request,
    service: ServiceDependency,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
    after: Annotated[str | None, Query(max_length=100)] = None,
) -> JSONResponse:
    """What a stored response has answered, the last item first unless asked otherwise; not the conversation before."""
    record = await _stored(require_store(service, param=None), owner_of(request), response_id)
    return JSONResponse(page_of_items(record.input_items, limit=limit, order=order, after=after))


@router.delete("/{response_id}")
async def delete_response(response_id: str, request: Request, service: ServiceDependency) -> JSONResponse:
    """Deletes a stored response and its conversation; later responses that continued it stay."""
    store, owner = require_store(service, param=None), owner_of(request)
    await _stored(store, owner, response_id)
    await _cancel(service, response_id)
    await store.delete_response(owner, response_id)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


@router.post("/{response_id}/cancel")
async def cancel_response(response_id: str, request: Request, service: ServiceDependency) -> JSONResponse:
    """Ends a response that is being made in the background; one that has ended stays as it is."""
    store, owner = require_store(service, param=None), owner_of(request)
    record = await _stored(store, owner, response_id)
    if not record.body["background"]:
        raise InvalidRequestError(
            "only responses with `background: true` can be cancelled", param="response_id", code="invalid_value"
        )
    await _cancel(service, response_id)
    record = await store.cancel_response(owner, response_id)  # another replica may be making it
    return JSONResponse(public(record.body))


async def _stored(store: StateStore, owner: str, response_id: str) -> ResponseRecord:
    """Raises `NotFoundError`."""
    if response_id.startswith(PREFIX):
        raise response_not_found(response_id)  # a conversation
    return await store.get_response(owner, response_id)


def _run(
    service: Service, body: ResponseRequest, owner: str, *, source: str, once: IdempotencyKey | None
) -> ResponseRun:
    if body.store or body.background:
        require_store(service, param="store")
    store = None if body.store is False else service.states
    ttl_s = time_to_live(service, None)
    return ResponseRun(service, body, owner=owner, store=store, ttl_s=ttl_s, source=source, once=once)


async def _earlier(service: Service, body: ResponseRequest, owner: str, once: IdempotencyKey) -> Response | None:
    """The response that there is for a key; None if there is none, or it has failed and may be tried again."""
    if body.store is False or service.states is None:
        return None
    try:
        record = await service.states.get_response(owner, once.response_id)
    except NotFoundError:
        return None
    once.check(record)
    if record.body["status"] == "failed":
        await service.states.delete_response(owner, once.response_id)
        return None
    return await _repeated(service, body, owner, once.response_id)


async def _repeated(service: Service, body: ResponseRequest, owner: str, response_id: str) -> Response:
    """A response that another request has asked for: as it is in the background, else when it has ended."""
    response: Response
    if body.stream:
        response = _events(service, owner, response_id, 0)
    else:
        async for found in _bodies(service, owner, response_id):
            told = public(found)
            if body.background:
                break
        response = JSONResponse(told)
    response.headers["idempotent-replayed"] = "true"
    return response


def _events(service: Service, owner: str, response_id: str, begin: int) -> Response:
    """The events of a stored response from number `begin` on, as they were or as they come."""
    log = service.event_logs.get(response_id)
    if log is not None:
        return _follow(service, log, begin)
    return EventStreamResponse(reported_later(_bodies(service, owner, response_id), begin), close=_nothing)


def _follow(service: Service, log: EventLog, begin: int) -> Response:
    """The events of a response that goes on without its readers."""
    return EventStreamResponse(
        log.follow(begin, keepalive_s=IN_TIME * service.options.keepalive_s, keepalive=KEEP_ALIVE), close=_nothing
    )


async def _bodies(service: Service, owner: str, response_id: str) -> AsyncIterator[Mapping[str, Any]]:
    """The stored response, again and again until it has ended."""
    store = require_store(service, param=None)
    while True:
        record = await _stored(store, owner, response_id)
        yield record.body
        if record.has_ended:
            return
        await asyncio.sleep(POLL_S)


async def _nothing() -> None:
    """What is behind a stream that makes nothing."""


async def _cancel(service: Service, response_id: str) -> None:
    task = service.background.get(response_id)
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
