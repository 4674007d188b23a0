"""Conversations of the Responses API: a list of items, and the response whose state has read the first of them.

A conversation is kept like a stored response. One that is answered continues from the state of its last response, where
that has read all items and the same instructions; else all of it is read again.
"""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog
from pydantic import TypeAdapter

from server.errors import InvalidRequestError, NotFoundError
from server.protocol.response_items import InputItem, InputItems, conversation_object, stored_item
from server.states.store import ResponseRecord, StateStore

logger = structlog.stdlib.get_logger("dijiang.responses")
PREFIX = "conv_"
MAX_ITEMS = 10_000
_ITEMS: TypeAdapter[list[InputItem]] = TypeAdapter(InputItems)


def new_conversation(
    owner: str, items: Sequence[InputItem], metadata: Mapping[str, str] | None, *, ttl_s: float | None
) -> ResponseRecord:
    """A conversation that nobody has answered."""
    body = {"object": "conversation", "status": "completed", "background": False, "metadata": dict(metadata or {})}
    name = f"{PREFIX}{uuid.uuid4().hex}"
    return ResponseRecord(name, owner, time.time(), ttl_s, body, tuple(stored_items(items)), None)


def stored_items(items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """Items as they are read again, each with an id of its own."""
    suffix = uuid.uuid4().hex
    return [stored_item(item, number, suffix) for number, item in enumerate(items)]


def public(conversation: ResponseRecord) -> dict[str, Any]:
    """As it is on the wire."""
    return conversation_object(conversation.id, conversation.created, conversation.body["metadata"])


async def find_conversation(store: StateStore, owner: str, conversation_id: str) -> ResponseRecord:
    """Raises `NotFoundError`."""
    if conversation_id.startswith(PREFIX):
        try:
            return await store.get_response(owner, conversation_id)
        except NotFoundError:
            pass
    raise _not_found(conversation_id)


async def change_conversation(
    store: StateStore, owner: str, conversation_id: str, change: Callable[[ResponseRecord], ResponseRecord]
) -> ResponseRecord:
    """Raises `NotFoundError`, and whatever `change` raises."""
    await find_conversation(store, owner, conversation_id)
    try:
        return await store.change_response(owner, conversation_id, change)
    except NotFoundError as error:
        raise _not_found(conversation_id) from error


def with_items(conversation: ResponseRecord, items: Sequence[Mapping[str, Any]]) -> ResponseRecord:
    """The same with items at its end; raises `InvalidRequestError` if there are too many."""
    found = (*conversation.input_items, *items)
    if len(found) > MAX_ITEMS:
        raise InvalidRequestError(
            f"the conversation would have {len(found):,} items, the limit is {MAX_ITEMS:,}", param="items"
        )
    return replace(conversation, input_items=found)


def without_item(conversation: ResponseRecord, item_id: str) -> ResponseRecord:
    """The same without an item; raises `NotFoundError`."""
    place = place_of(conversation, item_id)
    items = conversation.input_items[:place] + conversation.input_items[place + 1 :]
    return replace(conversation, input_items=items, body={**conversation.body, "tip": None})


def place_of(conversation: ResponseRecord, item_id: str) -> int:
    """Raises `NotFoundError`."""
    for place, item in enumerate(conversation.input_items):
        if item["id"] == item_id:
            return place
    raise NotFoundError(f"there is no item {item_id[:100]!r}", param="item_id", code="item_not_found")


@dataclass(frozen=True, slots=True)
class OpenConversation:
    """A conversation that is being answered.

    Attributes:
        num_items: that it had when its answer was planned.
        items: those that `tip` has not read.
        tip: a response whose state has read the others; None: there is none.
    """

    store: StateStore
    record: ResponseRecord
    num_items: int
    items: Sequence[InputItem]
    tip: str | None

    @classmethod
    async def find(
        cls, store: StateStore, owner: str, conversation_id: str, *, instructions: str | None
    ) -> "OpenConversation":
        """Raises `NotFoundError`."""
        record = await find_conversation(store, owner, conversation_id)
        await store.use_response(record.id)
        tip = record.body.get("tip")
        if tip is not None and tip["instructions"] != instructions:
            tip = None
        unread = [*record.input_items[0 if tip is None else tip["num_items"] :]]
        items = _ITEMS.validate_python(unread) if unread else []
        return cls(store, record, len(record.input_items), items, None if tip is None else tip["response_id"])

    def without_tip(self) -> "OpenConversation":
        """The same where its last response cannot be continued."""
        items = _ITEMS.validate_python([*self.record.input_items]) if self.record.input_items else []
        return replace(self, items=items, tip=None)

    async def extend(
        self, items: Sequence[Mapping[str, Any]], *, response_id: str | None, instructions: str | None
    ) -> None:
        """Adds what was asked and answered. One that was deleted meanwhile stays deleted.

        Args:
            response_id: whose state has read all of it; None: nobody's.
        """

        def change(record: ResponseRecord) -> ResponseRecord:
            extended = with_items(record, items)
            is_read = response_id is not None and len(record.input_items) == self.num_items
            tip = {
                "response_id": response_id,
                "num_items": len(extended.input_items),
                "instructions": instructions,
            }
            return replace(extended, body={**record.body, "tip": tip if is_read else None})

        try:
            await self.store.change_response(self.record.owner, self.record.id, change)
        except (NotFoundError, InvalidRequestError) as error:
            logger.warning("a conversation was not extended", id=self.record.id, problem=str(error))


def _not_found(conversation_id: str) -> NotFoundError:
    return NotFoundError(
        f"there is no conversation {conversation_id[:100]!r}", param="conversation", code="conversation_not_found"
    )
