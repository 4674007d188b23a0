"""`/v1/states`: conversations that are saved, named, forked, rewound, moved between servers, and deleted."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, BinaryIO

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import StreamingResponse

from server.api.json_body import JsonRoute, ServiceDependency
from server.engine.state.snapshot_files import Snapshot, SnapshotError, parse_snapshot, write_file
from server.engine.types.requests import EngineInfo
from server.engine.types.state import StateLayout
from server.errors import InvalidRequestError
from server.generation.conversations import encode_messages
from server.generation.planning import check_prompt, encode_prompts
from server.generation.sessions import (
    admit,
    cache_use,
    find_base,
    keeper,
    owner_of,
    require_store,
    system_prefix,
    time_to_live,
)
from server.generation.streaming import ClientGoneResponse, json_response
from server.http.sse import ClientDisconnectedError, unless_disconnected
from server.protocol.state_creation import CreatedState, CreateStateRequest
from server.protocol.states import (
    ForkRequest,
    Name,
    PointRequest,
    ReturnState,
    RewindRequest,
    State,
    StateDeleted,
    StateFields,
    StateList,
    TimeToLive,
    page_of,
)
from server.protocol.usage import Usage
from server.service import Service
from server.states.errors import state_not_found
from server.states.session import StateSession
from server.states.store import NewState, SnapshotRecord, StateRecord, Turn

MEDIA_TYPE = "application/octet-stream"
READ_BYTES = 1 << 20
router = APIRouter(route_class=JsonRoute, prefix="/v1/states", tags=["states"])


@router.post("", responses={200: {"model": CreatedState}}, response_class=Response)
async def create_state(body: CreateStateRequest, request: Request, service: ServiceDependency) -> Response:
    """Feeds a prompt or messages and saves the state after them; nothing is generated."""
    service.require_model(body.model)
    info = service.require_open()
    admit(request, service)
    wish = ReturnState(name=body.name, ttl_s=body.ttl_s)
    fields = StateFields(
        state_id=body.state_id, return_state=wish, cache_prompt=body.cache_prompt, cache_salt=body.cache_salt
    )
    base = await find_base(request, service, info, fields)
    prompt = await _encode(service, body, base)
    check_prompt(prompt, info.vocab_size, service.options.max_prompt_tokens, param="prompt")
    owner = owner_of(request, service)
    points = system_prefix(service, body.messages, prompt) if body.messages and base is None else ()
    session = StateSession(
        service.engine,
        owner=owner,
        store=service.states,
        layout=info.state_layout,
        base=None if base is None else base.head,
        base_of=base,
        keep=keeper(service, owner, wish, base),
        turn=body.turn,
        cache=cache_use(owner, fields, points=points),
    )
    try:
        state_id, usage = await unless_disconnected(request.receive, _feed(service, session, prompt))
    except ClientDisconnectedError:
        return ClientGoneResponse()
    service.rate_limits.charge(owner, usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens)
    record = await require_store(service, param=None).get(owner, state_id)
    state = State.of(record, model=service.options.model_name)
    return json_response(CreatedState(**dict(state), usage=usage))


@router.get("")
async def list_states(
    request: Request,
    service: ServiceDependency,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=100)] = None,
    name: Annotated[str | None, Query(max_length=100)] = None,
) -> StateList:
    """Your states, newest first; with `name`, the one of that name."""
    store = require_store(service, param=None)
    records = await store.list_states(owner_of(request, service), limit=limit + 1, after=after, name=name)
    return page_of(records, limit=limit, model=service.options.model_name)


@router.post("/import", openapi_extra={"requestBody": {"content": {MEDIA_TYPE: {}}, "required": True}})
async def import_state(
    request: Request,
    service: ServiceDependency,
    name: Annotated[Name | None, Query()] = None,
    ttl_s: Annotated[TimeToLive | None, Query()] = None,
) -> State:
    """Takes in a file that `/export` gave, here or on another server of the same model."""
    store, info, owner = require_store(service, param=None), service.require_open(), owner_of(request, service)
    content = await request.body()
    snapshot = await asyncio.to_thread(_checked, content, info)
    async with store.room(1, bytes_each=len(content), owner=owner) as room:
        await asyncio.to_thread(write_file, room.path(0), [content])
        head = _record_of(snapshot, room.files[0], len(content), info)
        record = await store.add(NewState(owner, head, name, None, time_to_live(service, ttl_s)))
    return State.of(record, model=service.options.model_name)


@router.get("/{state_id}")
async def get_state(state_id: str, request: Request, service: ServiceDependency) -> State:
    """One state."""
    record = await require_store(service, param=None).get(owner_of(request, service), state_id)
    return State.of(record, model=service.options.model_name)


@router.delete("/{state_id}")
async def delete_state(state_id: str, request: Request, service: ServiceDependency) -> StateDeleted:
    """Deletes a state; answers that are just going on from it are not disturbed."""
    await require_store(service, param=None).delete(owner_of(request, service), state_id)
    return StateDeleted(id=state_id, object="state", deleted=True)


@router.post("/{state_id}/fork")
async def fork_state(body: ForkRequest, state_id: str, request: Request, service: ServiceDependency) -> State:
    """A second state that goes its own way from here."""
    store, owner = require_store(service, param=None), owner_of(request, service)
    ttl_s = time_to_live(service, body.ttl_s)
    fork = await store.fork(owner, state_id, point=body.point, name=body.name, ttl_s=ttl_s)
    return State.of(fork, model=service.options.model_name)


@router.post("/{state_id}/points")
async def mark_point(body: PointRequest, state_id: str, request: Request, service: ServiceDependency) -> State:
    """Gives the position where the state is now a name, to rewind to."""
    record = await require_store(service, param=None).mark(owner_of(request, service), state_id, body.name)
    return State.of(record, model=service.options.model_name)


@router.post("/{state_id}/rewind")
async def rewind_state(body: RewindRequest, state_id: str, request: Request, service: ServiceDependency) -> State:
    """Puts the state back to a point; what came after is forgotten unless a point or a fork holds it."""
    record = await require_store(service, param=None).rewind(owner_of(request, service), state_id, body.point)
    return State.of(record, model=service.options.model_name)


@router.get("/{state_id}/export", responses={200: {"content": {MEDIA_TYPE: {}}}}, response_class=Response)
async def export_state(
    state_id: str,
    request: Request,
    service: ServiceDependency,
    point: Annotated[str | None, Query(max_length=100)] = None,
) -> Response:
    """The state as a safetensors file, whole with its model's fingerprint."""
    store = require_store(service, param=None)
    record = await store.use(owner_of(request, service), state_id)
    head = record.at(point)
    info = service.engine.info
    layout = None if info is None else info.state_layout
    async with store.hold(head) as path:
        # Open files stay readable when they are deleted, so it is held no longer than this.
        file = await asyncio.to_thread(_opened, path, head, layout)
    headers = {
        "content-length": str(head.num_bytes),
        "content-disposition": f'attachment; filename="{record.id}.safetensors"',
    }
    return StreamingResponse(_read(file), media_type=MEDIA_TYPE, headers=headers)


async def _encode(service: Service, body: CreateStateRequest, base: StateRecord | None) -> tuple[int, ...]:
    if body.messages is not None:
        return await encode_messages(
            service,
            body.messages,
            add_generation_prompt=body.add_generation_prompt is True,
            base=None if base is None else base.head,
        )
    with_special = base is None if body.add_special_tokens is None else body.add_special_tokens
    prompts = await encode_prompts(service, body.prompts, add_special_tokens=with_special, continues=base is not None)
    return prompts[0]


async def _feed(service: Service, session: StateSession, prompt: tuple[int, ...]) -> tuple[str, Usage]:
    with service.generating():
        async with session.opened(1):
            saved, num_cached = await session.feed(prompt, 0)
            state_id = await session.keep(saved)
    service.metrics.prompt_tokens.inc(len(prompt))
    usage = Usage.of(
        prompt_tokens=session.num_past_tokens + len(prompt),
        completion_tokens=0,
        cached_tokens=session.num_fed_tokens + num_cached,
    )
    return state_id, usage


def _checked(content: bytes, info: EngineInfo) -> Snapshot:
    assert info.state_layout is not None
    try:
        return parse_snapshot(content, info.state_layout)
    except SnapshotError as error:
        raise InvalidRequestError(str(error), param="file", code=error.code) from error


def _record_of(snapshot: Snapshot, file: str, num_bytes: int, info: EngineInfo) -> SnapshotRecord:
    assert info.state_layout is not None
    return SnapshotRecord(
        file=file,
        position=snapshot.position,
        pending=snapshot.pending,
        last_token=snapshot.last_token,
        turn=_turn_of(snapshot.note),
        num_bytes=num_bytes,
        fingerprint=info.state_layout.fingerprint,
    )


def _turn_of(note: str) -> Turn:
    """What the server that saved it has noted; plain text if that says nothing."""
    try:
        return Turn(json.loads(note)["turn"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return Turn.TEXT


def _opened(path: Path, head: SnapshotRecord, layout: StateLayout | None) -> BinaryIO:
    """The file, whole and as it was saved, at its begin.

    Raises:
        NotFoundError: it is gone.
        InvalidRequestError: it is damaged.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise state_not_found(head.file) from error
    try:
        if layout is not None and layout.fingerprint == head.fingerprint:
            parse_snapshot(file.read(), layout)
        elif file.seek(0, os.SEEK_END) != head.num_bytes:
            raise SnapshotError("the state's file is cut off")
    except (SnapshotError, OSError) as error:
        file.close()
        raise InvalidRequestError(f"the state cannot be exported: {error}", code="state_invalid") from error
    file.seek(0)
    return file


async def _read(file: BinaryIO) -> AsyncIterator[bytes]:
    try:
        while chunk := await asyncio.to_thread(file.read, READ_BYTES):
            yield chunk
    finally:
        file.close()
