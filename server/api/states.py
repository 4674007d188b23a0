"""`/v1/states`: conversations that are saved, named, forked, rewound, moved between servers, and deleted."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import StreamingResponse

from server.api.json_body import JsonRoute, ServiceDependency
from server.engine.state.snapshot_files import Snapshot, SnapshotError, parse_snapshot, write_file
from server.engine.types.requests import EngineInfo
from server.engine.types.state import StateLayout
from server.errors import InvalidRequestError
from server.generation.sessions import require_store, time_to_live
from server.generation.streaming import close, collected, json_response, owner_of, started
from server.http.sse import unless_disconnected
from server.protocol.state_creation import CreatedState, CreateStateRequest
from server.protocol.states import (
    ForkRequest,
    Name,
    PointRequest,
    RewindRequest,
    State,
    StateDeleted,
    StateList,
    TimeToLive,
    page_of,
)
from server.states.errors import state_not_found
from server.states.store import NewState, SnapshotRecord, TurnEnd

MEDIA_TYPE = "application/octet-stream"
READ_BYTES = 1 << 20
router = APIRouter(route_class=JsonRoute, prefix="/v1/states", tags=["states"])


@router.post("", responses={200: {"model": CreatedState}}, response_class=Response)
async def create_state(body: CreateStateRequest, request: Request, service: ServiceDependency) -> Response:
    """Feeds a prompt or messages and saves the state after them; nothing is generated."""
    owner = owner_of(request)
    generation = await unless_disconnected(request.receive, started(service, owner, body.generation))
    (fed,) = await collected(request, generation.collect(), close=partial(close, request, service, generation))
    assert fed.state_id is not None
    record = await require_store(service, param=None).get(owner, fed.state_id)
    state = State.of(record, model=service.options.model_name)
    return json_response(CreatedState(**dict(state), usage=generation.usage))


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
    records = await store.list_states(owner_of(request), limit=limit + 1, after=after, name=name)
    return page_of(records, limit=limit, model=service.options.model_name)


@router.post("/import", openapi_extra={"requestBody": {"content": {MEDIA_TYPE: {}}, "required": True}})
async def import_state(
    request: Request,
    service: ServiceDependency,
    name: Annotated[Name | None, Query()] = None,
    ttl_s: Annotated[TimeToLive | None, Query()] = None,
) -> State:
    """Takes in a file that `/export` gave, here or on another server of the same model."""
    store, info, owner = require_store(service, param=None), service.require_open(), owner_of(request)
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
    record = await require_store(service, param=None).get(owner_of(request), state_id)
    return State.of(record, model=service.options.model_name)


@router.delete("/{state_id}")
async def delete_state(state_id: str, request: Request, service: ServiceDependency) -> StateDeleted:
    """Deletes a state; answers that are being computed from it are not disturbed."""
    await require_store(service, param=None).delete(owner_of(request), state_id)
    return StateDeleted(id=state_id, object="state", deleted=True)


@router.post("/{state_id}/fork")
async def fork_state(body: ForkRequest, state_id: str, request: Request, service: ServiceDependency) -> State:
    """A second state that goes its own way from here."""
    store, owner = require_store(service, param=None), owner_of(request)
    ttl_s = time_to_live(service, body.ttl_s)
    fork = await store.fork(owner, state_id, point=body.point, name=body.name, ttl_s=ttl_s)
    return State.of(fork, model=service.options.model_name)


@router.post("/{state_id}/points")
async def mark_point(body: PointRequest, state_id: str, request: Request, service: ServiceDependency) -> State:
    """Gives the position where the state is now a name, to rewind to."""
    record = await require_store(service, param=None).mark(owner_of(request), state_id, body.name)
    return State.of(record, model=service.options.model_name)


@router.post("/{state_id}/rewind")
async def rewind_state(body: RewindRequest, state_id: str, request: Request, service: ServiceDependency) -> State:
    """Puts the state back to a point; what came after is forgotten unless a point or a fork holds it."""
    record = await require_store(service, param=None).rewind(owner_of(request), state_id, body.point)
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
    record = await store.use(owner_of(request), state_id)
    head = record.at(point)
    info = service.engine.info
    layout = None if info is None else info.state_layout
    async with store.hold(head) as path:
        # Open files stay readable when they are deleted, so it is held no longer than this.
        file = await asyncio.to_thread(_opened, path, head, layout, state_id)
    headers = {
        "content-length": str(head.num_bytes),
        "content-disposition": f'attachment; filename="{record.id}.safetensors"',
    }
    return StreamingResponse(_read(file), media_type=MEDIA_TYPE, headers=headers)


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


def _turn_of(note: str) -> TurnEnd:
    """What the server that saved it has noted; plain text if that says nothing."""
    try:
        return TurnEnd(json.loads(note)["turn"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return TurnEnd.TEXT


def _opened(path: Path, head: SnapshotRecord, layout: StateLayout | None, state_id: str) -> BinaryIO:
    """The file, whole and as it was saved, at its begin.

    Raises:
        NotFoundError: it is gone.
        InvalidRequestError: it is damaged.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise state_not_found(state_id) from error
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
