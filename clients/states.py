"""Saved conversations (`/v1/states`), for servers of this kind.

states = States(client)
answer = client.chat(messages, return_state={"name": "trip"})
state = states.find("trip")
later = client.chat([{"role": "user", "content": "Go on."}], state_id=state.id)
"""

from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, urlencode

from pydantic import BaseModel, ConfigDict

from clients.calls import Call
from clients.client import AsyncClient, Client
from clients.types import Message

PATH = "/v1/states"
ID_PREFIX = "state_"


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class Point(_Wire):
    """A named position to which a state can be rewound."""

    name: str
    created_at: int = 0
    num_tokens: int = 0


class State(_Wire):
    """A saved conversation."""

    id: str
    created_at: int = 0
    last_used_at: int = 0
    expires_at: int | None = None
    name: str | None = None
    parent_id: str | None = None
    model: str = ""
    model_fingerprint: str = ""
    num_tokens: int = 0
    bytes: int = 0
    points: tuple[Point, ...] = ()


class StatePage(_Wire):
    """Some states, newest first."""

    data: tuple[State, ...]
    has_more: bool = False
    next_cursor: str | None = None


def create(body: Mapping[str, Any]) -> Call[State]:
    """`POST /v1/states`."""
    return Call("POST", PATH, State.model_validate, body)


def page(*, after: str | None = None, name: str | None = None, limit: int = 100) -> Call[StatePage]:
    """`GET /v1/states`."""
    query = {"limit": str(limit), "after": after, "name": name}
    given = urlencode({key: value for key, value in query.items() if value is not None})
    return Call("GET", f"{PATH}?{given}", StatePage.model_validate)


def get(state_id: str) -> Call[State]:
    """`GET /v1/states/{id}`."""
    return Call("GET", _path(state_id), State.model_validate)


def delete(state_id: str) -> Call[None]:
    """`DELETE /v1/states/{id}`."""
    return Call("DELETE", _path(state_id), lambda _: None)


def change(state_id: str, action: str, **fields: object) -> Call[State]:
    """`POST /v1/states/{id}/fork`, `/points` or `/rewind`; fields that are None are left out."""
    body = {name: value for name, value in fields.items() if value is not None}
    return Call("POST", f"{_path(state_id)}/{action}", State.model_validate, body)


def export(state_id: str) -> Call[bytes]:
    """`GET /v1/states/{id}/export`; the answer is a file."""
    return Call("GET", f"{_path(state_id)}/export", _file)


def import_(content: bytes, *, name: str | None = None) -> Call[State]:
    """`POST /v1/states/import`; the body is a file."""
    query = "" if name is None else f"?{urlencode({'name': name})}"
    return Call("POST", f"{PATH}/import{query}", State.model_validate, content=content)


class States:
    """The states of one key."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(self, messages: Iterable[Message], *, name: str | None = None) -> State:
        """Feeds a conversation and keeps the state after it; nothing is generated."""
        return self._client.answer(create(_body(messages, name)))

    def list(self) -> tuple[State, ...]:
        """All of them, newest first."""
        states: list[State] = []
        after: str | None = None
        while True:
            found = self._client.answer(page(after=after))
            states += found.data
            if not found.has_more:
                return tuple(states)
            after = found.next_cursor

    def get(self, state_id: str) -> State:
        """One; `NotFoundError` if there is none of that id."""
        return self._client.answer(get(state_id))

    def find(self, name: str) -> State | None:
        """The one of that name, if there is one."""
        return next(iter(self._client.answer(page(name=name, limit=1)).data), None)

    def delete(self, state_id: str) -> None:
        """Deletes one."""
        self._client.answer(delete(state_id))

    def fork(self, state_id: str, *, name: str | None = None, point: str | None = None) -> State:
        """A second state that goes its own way from here, or from a point."""
        return self._client.answer(change(state_id, "fork", name=name, point=point))

    def mark(self, state_id: str, point: str) -> State:
        """Gives the position where the state is now a name."""
        return self._client.answer(change(state_id, "points", name=point))

    def rewind(self, state_id: str, point: str) -> State:
        """Puts the state back to a point."""
        return self._client.answer(change(state_id, "rewind", point=point))

    def export(self, state_id: str) -> bytes:
        """The state as a safetensors file."""
        return self._client.answer(export(state_id))

    def import_(self, content: bytes, *, name: str | None = None) -> State:
        """Takes in a file that `export` gave, here or elsewhere."""
        return self._client.answer(import_(content, name=name))


class AsyncStates:
    """The states of one key, for asyncio."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def create(self, messages: Iterable[Message], *, name: str | None = None) -> State:
        """Feeds a conversation and keeps the state after it; nothing is generated."""
        return await self._client.answer(create(_body(messages, name)))

    async def get(self, state_id: str) -> State:
        """One; `NotFoundError` if there is none of that id."""
        return await self._client.answer(get(state_id))

    async def find(self, name: str) -> State | None:
        """The one of that name, if there is one."""
        return next(iter((await self._client.answer(page(name=name, limit=1))).data), None)

    async def list(self) -> tuple[State, ...]:
        """All of them, newest first."""
        states: list[State] = []
        after: str | None = None
        while True:
            found = await self._client.answer(page(after=after))
            states += found.data
            if not found.has_more:
                return tuple(states)
            after = found.next_cursor

    async def delete(self, state_id: str) -> None:
        """Deletes one."""
        await self._client.answer(delete(state_id))

    async def fork(self, state_id: str, *, name: str | None = None, point: str | None = None) -> State:
        """A second state that goes its own way from here, or from a point."""
        return await self._client.answer(change(state_id, "fork", name=name, point=point))

    async def mark(self, state_id: str, point: str) -> State:
        """Gives the position where the state is now a name."""
        return await self._client.answer(change(state_id, "points", name=point))

    async def rewind(self, state_id: str, point: str) -> State:
        """Puts the state back to a point."""
        return await self._client.answer(change(state_id, "rewind", point=point))

    async def export(self, state_id: str) -> bytes:
        """The state as a safetensors file."""
        return await self._client.answer(export(state_id))

    async def import_(self, content: bytes, *, name: str | None = None) -> State:
        """Takes in a file that `export` gave, here or elsewhere."""
        return await self._client.answer(import_(content, name=name))


def _file(content: object) -> bytes:
    assert isinstance(content, bytes)
    return content


def _body(messages: Iterable[Message], name: str | None) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": list(messages)}
    return body if name is None else {**body, "name": name}


def _path(state_id: str) -> str:
    return f"{PATH}/{quote(state_id, safe='')}"
