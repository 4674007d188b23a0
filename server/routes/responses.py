"""`/v1/responses`: answers that are kept, and gone on from at the price of what is new."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from server.engine.types import EngineInfo
from server.errors import InvalidRequestError, NotFoundError
from server.protocol.responses import ResponseRequest
from server.protocol.sampling import GenerationFields
from server.routes.answers import Generation
from server.routes.json_body import JsonRoute, ServiceDependency
from server.routes.prompting import encode_messages, plan_generation
from server.routes.response_run import ResponseRun
from server.routes.sessions import check_fingerprint, owner_of, require_store, system_prefix, time_to_live
from server.routes.streaming import ClientGoneResponse, collect_answers, note_usage
from server.routes.structure import checked_grammar
from server.service import Service
from server.sse import ClientDisconnectedError, EventStreamResponse
from server.states.session import CacheUse, StateSession
from server.states.store import SnapshotRecord, Turn

router = APIRouter(route_class=JsonRoute, prefix="/v1/responses", tags=["responses"])


@router.post("", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})
async def create_response(body: ResponseRequest, request: Request, service: ServiceDependency) -> Response:
    """Answers an input, alone or after an earlier response."""
    service.require_model(body.model)
    info = service.require_open()
    owner = owner_of(request, service)
    run = _run(service, body, owner)
    run.generation = await _plan(service, info, body, run, owner)
    await run.generation.start()
    if body.background:
        return await _in_background(service, run)
    if body.stream:
        return _stream(request, run)
    try:
        (answer,) = await collect_answers(request, run.generation)
        return JSONResponse(await run.finished(answer))
    except ClientDisconnectedError:
        return ClientGoneResponse()
    finally:
        await run.ended()


@router.get("/{response_id}")
async def get_response(
    response_id: str,
    request: Request,
    service: ServiceDependency,
    stream: Annotated[bool, Query()] = False,
) -> JSONResponse:
    """A stored response."""
    if stream:
        raise InvalidRequestError(
            "`stream` of a stored response is not supported by this server",
            param="stream",
            code="unsupported_parameter",
        )
    record = await require_store(service, param=None).get_response(owner_of(request, service), response_id)
    return JSONResponse(dict(record.body))


@router.get("/{response_id}/input_items")
async def list_input_items(response_id: str, request: Request, service: ServiceDependency) -> JSONResponse:
    """What a stored response has answered, in order; not the conversation before it."""
    record = await require_store(service, param=None).get_response(owner_of(request, service), response_id)
    items = list(record.input_items)
    ids = {"first_id": items[0]["id"], "last_id": items[-1]["id"]}
    return JSONResponse({"object": "list", "data": items, "has_more": False, **ids})


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
    return JSONResponse(dict(record.body))


def _run(service: Service, body: ResponseRequest, owner: str) -> ResponseRun:
    if body.store or body.background:
        require_store(service, param="store")
    store = None if body.store is False else service.states
    return ResponseRun(service, body, owner=owner, store=store, ttl_s=time_to_live(service, None))


async def _plan(service: Service, info: EngineInfo, body: ResponseRequest, run: ResponseRun, owner: str) -> Generation:
    base = await _base(service, info, body, owner)
    messages = body.messages
    prompt = await encode_messages(service, messages, base=base)
    points = system_prefix(service, messages, prompt) if base is None else ()
    salt = "" if body.cache_salt is None else body.cache_salt
    session = StateSession(
        service.engine,
        store=service.states,
        layout=info.state_layout,
        base=base,
        keep=run.keep_state if body.store is not False and service.states is not None else None,
        turn=Turn.OPEN,
        cache=None if body.cache_prompt is False else CacheUse(owner, salt, points),
    )
    fields = GenerationFields(
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        timeout=body.timeout,
    )
    grammar = await checked_grammar(service, info, None if body.text is None else body.text.wanted_grammar)
    return plan_generation(
        service, info, fields, [prompt], param="input", max_tokens=None, session=session, grammar=grammar
    )


async def _base(service: Service, info: EngineInfo, body: ResponseRequest, owner: str) -> SnapshotRecord | None:
    """The conversation at the end of the previous response."""
    if body.previous_response_id is None:
        return None
    store = require_store(service, param="previous_response_id")
    try:
        record = await store.get_response(owner, body.previous_response_id)
    except NotFoundError as error:
        raise NotFoundError(error.message, param="previous_response_id", code="previous_response_not_found") from error
    if record.snapshot is None or not record.has_ended:
        raise InvalidRequestError(
            f"the previous response is {record.body['status']} and cannot be gone on from",
            param="previous_response_id",
            code="invalid_value",
        )
    check_fingerprint(record.snapshot, info)
    await store.use_response(record.id)
    return record.snapshot


async def _in_background(service: Service, run: ResponseRun) -> Response:
    response = run.object("in_progress")
    try:
        await run.put(response)
    except BaseException:
        await run.generation.close()
        await run.ended()
        raise
    task = asyncio.create_task(run.in_background())
    service.background[run.id] = task
    task.add_done_callback(lambda _: service.background.pop(run.id, None))
    return JSONResponse(response)


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
