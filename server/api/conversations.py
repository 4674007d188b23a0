"""`/v1/conversations`: lists of items that `conversation` in `/v1/responses` answers and extends."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from server.api.json_body import JsonRoute, ServiceDependency
from server.generation.sessions import require_store, time_to_live
from server.generation.streaming import owner_of
from server.protocol.response_items import CreateConversation, CreateItems, UpdateConversation, page_of_items
from server.responses.conversations import (
    change_conversation,
    find_conversation,
    new_conversation,
    place_of,
    public,
    stored_items,
    with_items,
    without_item,
)

router = APIRouter(route_class=JsonRoute, prefix="/v1/conversations", tags=["conversations"])


@router.post("")
async def create_conversation(body: CreateConversation, request: Request, service: ServiceDependency) -> JSONResponse:
    """A new conversation, empty or with items."""
    store, ttl_s = require_store(service, param=None), time_to_live(service, None)
    record = new_conversation(owner_of(request), body.items, body.metadata, ttl_s=ttl_s)
    await store.put_response(record)
    return JSONResponse(public(record))


@router.get("/{conversation_id}")
async def get_conversation(conversation_id: str, request: Request, service: ServiceDependency) -> JSONResponse:
    """A conversation, without its items."""
    store = require_store(service, param=None)
    return JSONResponse(public(await find_conversation(store, owner_of(request), conversation_id)))


@router.post("/{conversation_id}")
async def update_conversation(
    conversation_id: str, body: UpdateConversation, request: Request, service: ServiceDependency
) -> JSONResponse:
    """Other metadata for a conversation."""
    store = require_store(service, param=None)
    changed = await change_conversation(
        store,
        owner_of(request),
        conversation_id,
        lambda record: replace(record, body={**record.body, "metadata": body.metadata}),
    )
    return JSONResponse(public(changed))


@router.delete("/{conversation_id}")
async def delete_conversation(conversation_id: str, request: Request, service: ServiceDependency) -> JSONResponse:
    """Deletes a conversation; the responses in it stay."""
    store, owner = require_store(service, param=None), owner_of(request)
    await find_conversation(store, owner, conversation_id)
    await store.delete_response(owner, conversation_id)
    return JSONResponse({"id": conversation_id, "object": "conversation.deleted", "deleted": True})


@router.post("/{conversation_id}/items")
async def create_items(
    conversation_id: str, body: CreateItems, request: Request, service: ServiceDependency
) -> JSONResponse:
    """Adds items at the end; nothing is generated."""
    store, items = require_store(service, param=None), stored_items(body.items)
    await change_conversation(store, owner_of(request), conversation_id, lambda record: with_items(record, items))
    return JSONResponse(page_of_items(items, limit=len(items), order="asc", after=None))


@router.get("/{conversation_id}/items")
async def list_items(
    conversation_id: str,
    request: Request,
    service: ServiceDependency,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
    after: Annotated[str | None, Query(max_length=100)] = None,
) -> JSONResponse:
    """Its items, the last one first unless asked otherwise."""
    record = await find_conversation(require_store(service, param=None), owner_of(request), conversation_id)
    return JSONResponse(page_of_items(record.input_items, limit=limit, order=order, after=after))


@router.get("/{conversation_id}/items/{item_id}")
async def get_item(conversation_id: str, item_id: str, request: Request, service: ServiceDependency) -> JSONResponse:
    """One item."""
    record = await find_conversation(require_store(service, param=None), owner_of(request), conversation_id)
    item: Any = record.input_items[place_of(record, item_id)]
    return JSONResponse(item)


@router.delete("/{conversation_id}/items/{item_id}")
async def delete_item(conversation_id: str, item_id: str, request: Request, service: ServiceDependency) -> JSONResponse:
    """Deletes one item; the conversation without it."""
    store = require_store(service, param=None)
    changed = await change_conversation(
        store, owner_of(request), conversation_id, lambda record: without_item(record, item_id)
    )
    return JSONResponse(public(changed))
