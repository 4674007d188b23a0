"""`/v1/responses`: answers that are kept, and gone on from at the price of what is new."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from server.api.json_body import JsonRoute, ServiceDependency
from server.engine.types.requests import EngineInfo
from server.errors import InvalidRequestError, NotFoundError
from server.event_log import EventLog
from server.generation.conversations import encode_messages, template_variables
from server.generation.sessions import admit, check_fingerprint, owner_of, require_store, system_prefix, time_to_live
from server.generation.streaming import ClientGoneResponse, note_usage
from server.generation.tools import form_of, told_tools
from server.http.sse import KEEP_ALIVE, ClientDisconnectedError, EventStreamResponse, unless_disconnected
from server.protocol.chat import MessageIn
from server.protocol.responses import ResponseRequest
from server.responses.background import make_in_background
from server.responses.events import public, told_later
from server.responses.plan import plan_response
from server.responses.run import ResponseRun
from server.service import Service
from server.states.store import ResponseRecord

POLL_S = 0.5
router = APIRouter(route_class=JsonRoute, prefix="/v1/responses", tags=["responses"])


@router.post("", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})
async def create_response(body: ResponseRequest, request: Request, service: ServiceDependency) -> Response:
    """Answers an input, alone or after an earlier response."""
    service.require_model(body.model)
    info = service.require_open()
    admit(request, service)
    owner = owner_of(request, service)
    run = _run(service, body, owner, source=(await request.body()).decode())
    await _plan(service, info, body, run, owner)
    await run.generation.start()
    if body.background:
        response = await _in_background(service, run)
        return _follow(service, run.log, 0) if body.stream else response
    if body.stream:
        return _stream(request, run)
    try:
        return JSONResponse(await unless_disconnected(request.receive, run.whole()))
    except ClientDisconnectedError:
        return ClientGoneResponse()
    finally:
        await run.generation.close()
        await run.ended()
        note_usage(request, run.generation)


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
    store, owner = require_store(service, param=None), owner_of(request, service)
    record = await store.get_response(owner, response_id)
    if not stream:
        return JSONResponse(public(record.body))
    begin = 0 if starting_after is None else starting_after + 1
    log = service.event_logs.get(response_id)
    if log is not None:
        return _follow(service, log, begin)
    return EventStreamResponse(told_later(_bodies(service, owner, response_id), begin), close=_nothing)


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
    record = await require_store(service, param=None).get_response(owner_of(request, service), response_id)
    items = list(record.input_items) if order == "asc" else list(record.input_items)[::-1]
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidRequestError(f"there is no item {after!r}", param="after", code="invalid_value")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return JSONResponse({"object": "list", "data": page, "has_more": len(items) > limit, **ends})


@router.delete("/{response_id}")
async def delete_response(response_id: str, request: Request, service: ServiceDependency) -> JSONResponse:
    """Deletes a stored response and its conversation; later responses that went on from it stay."""
    store, owner = require_store(service, param=None), owner_of(request, service)
    await store.get_response(owner, response_id)
    await _cancel(service, response_id)
    await store.delete_response(owner, response_id)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


@router.post("/{response_id}/cancel")
async def cancel_response(response_id: str, request: Request, service: ServiceDependency) -> JSONResponse:
    """Ends a response that is being made in the background; one that has ended stays as it is."""
    store, owner = require_store(service, param=None), owner_of(request, service)
    record = await store.get_response(owner, response_id)
    if not record.body["background"]:
        raise InvalidRequestError(
            "only responses with `background: true` can be cancelled", param="response_id", code="invalid_value"
        )
    await _cancel(service, response_id)
    record = await store.cancel_response(owner, response_id)  # another replica may be making it
    return JSONResponse(public(record.body))


def _run(service: Service, body: ResponseRequest, owner: str, *, source: str) -> ResponseRun:
    if body.store or body.background:
        require_store(service, param="store")
    store = None if body.store is False else service.states
    return ResponseRun(service, body, owner=owner, store=store, ttl_s=time_to_live(service, None), source=source)


async def _plan(service: Service, info: EngineInfo, body: ResponseRequest, run: ResponseRun, owner: str) -> None:
    previous = await _previous(service, info, body, owner)
    base = None if previous is None else previous.snapshot
    messages, tools = _told(service, body, previous)
    variables = template_variables(service, None, body.reasoning_effort, param="reasoning")
    prompt = await encode_messages(service, messages, base=base, tools=tools, variables=variables, param="input")
    points = system_prefix(service, messages, prompt, tools=tools) if base is None else ()
    run.unfinished = replace(run.unfinished, base=base)
    await plan_response(service, info, body, run, prompt=prompt, base=base, base_of=previous, cache_points=points)


def _told(
    service: Service, body: ResponseRequest, previous: ResponseRecord | None
) -> tuple[list[MessageIn], tuple[Mapping[str, Any], ...]]:
    """The new messages, and the tools that the template is to tell of.

    Tools stand at the beginning of a conversation, and nothing can be added to the beginning of a state: tools that the
    previous response did not have are told in a message of their own.
    """
    messages, tools = body.messages, told_tools(body.tool_use)
    if previous is None or not tools or previous.body.get("tools") == body.told_tools:
        return messages, tools
    return [MessageIn(role="system", content=form_of(service).told(tools)), *messages], ()


async def _previous(service: Service, info: EngineInfo, body: ResponseRequest, owner: str) -> ResponseRecord | None:
    """The response that this one goes on from."""
    if body.previous_response_id is None:
        return None
    store = require_store(service, param="previous_response_id")
    try:
        record = await store.get_response(owner, body.previous_response_id)
    except NotFoundError as error:
        raise NotFoundError(error.message, param="previous_response_id", code="previous_response_not_found") from error
    if record.snapshot is None or not record.has_ended:
        raise InvalidRequestError(
            f"the previous response is {record.body['status']} and cannot be continued",
            param="previous_response_id",
            code="invalid_value",
        )
    check_fingerprint(record.snapshot, info)
    await store.use_response(record.id)
    return record


async def _in_background(service: Service, run: ResponseRun) -> Response:
    response = run.object("in_progress")
    try:
        await run.put(response)
    except BaseException:
        await run.generation.close()
        await run.ended()
        raise
    make_in_background(service, run)
    return JSONResponse(response)


def _follow(service: Service, log: EventLog, begin: int) -> Response:
    """The events of a response that goes on without its readers."""
    return EventStreamResponse(
        log.follow(begin, keepalive_s=service.options.keepalive_s, keepalive=KEEP_ALIVE), close=_nothing
    )


async def _bodies(service: Service, owner: str, response_id: str) -> AsyncIterator[Mapping[str, Any]]:
    """The stored response, again and again until it has ended."""
    store = require_store(service, param=None)
    while True:
        record = await store.get_response(owner, response_id)
        yield record.body
        if record.has_ended:
            return
        await asyncio.sleep(POLL_S)


async def _nothing() -> None:
    """What is behind a stream that makes nothing."""


def _stream(request: Request, run: ResponseRun) -> Response:
    async def close() -> None:
        await run.generation.close()
        await run.ended()
        note_usage(request, run.generation)

    return EventStreamResponse(run.events(), close=close)


async def _cancel(service: Service, response_id: str) -> None:
    task = service.background.get(response_id)
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
