"""From a request's state fields to its session: whose states, which one to begin from, and how to keep the ends."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers

from dijiang_model.text.template import TemplateFailure
from server.engine.types.requests import EngineInfo
from server.errors import InvalidRequestError
from server.http.middleware import hash_key
from server.protocol.chat import MessageIn
from server.protocol.states import ReturnState, StateFields
from server.service import Service
from server.states.errors import name_taken
from server.states.session import CacheUse, Keep, Rescue, StateSession
from server.states.store import NewState, SnapshotRecord, StateRecord, StateStore, Turn
from server.text.template import ChatMessage

SHUTDOWN_TTL_S = 86_400.0
EVERYBODY = "everybody"
"""The owner where no keys are asked for."""


def owner_of(request: Request, service: Service) -> str:
    """Whose states a request may see: one owner for each key, without the key."""
    if not service.options.key_hashes:
        return EVERYBODY
    _, _, key = Headers(scope=request.scope).get("authorization", "").partition(" ")
    return hashlib.sha256(b"owner of states" + hash_key(key.strip().encode("latin-1"))).hexdigest()


def admit(request: Request, service: Service) -> None:
    """Counts a request that will make the engine work; raises `RateLimitError`."""
    service.rate_limits.admit(owner_of(request, service))


def require_store(service: Service, *, param: str | None) -> StateStore:
    """Raises a 400 where no states are kept."""
    if service.states is None:
        raise InvalidRequestError("this server saves no states", param=param, code="states_unavailable")
    return service.states


async def find_base(
    request: Request, service: Service, info: EngineInfo, fields: StateFields, *, num_choices: int = 1
) -> StateRecord | None:
    """The state that a request goes on from; None if it names none.

    Raises:
        NotFoundError: there is none of that id, or it is another owner's.
        InvalidRequestError: it is another model's, or the fields contradict each other.
    """
    if fields.return_state is not None:
        _check_return(fields.return_state, num_choices)
        await _check_name(request, service, fields.return_state.name)
    if fields.state_id is None:
        return None
    store = require_store(service, param="state_id")
    record = await store.use(owner_of(request, service), fields.state_id)
    check_fingerprint(record.head, info)
    return record


def check_fingerprint(snapshot: SnapshotRecord, info: EngineInfo) -> None:
    """Raises a 400 for a state of another model."""
    if info.state_layout is None or snapshot.fingerprint != info.state_layout.fingerprint:
        raise InvalidRequestError("this is a state of another model", param="state_id", code="state_of_another_model")


def state_session(
    request: Request,
    service: Service,
    info: EngineInfo,
    fields: StateFields,
    base: StateRecord | None,
    *,
    turn: Turn,
    cache_points: Sequence[int] = (),
) -> StateSession:
    """The session of a generating request."""
    owner = owner_of(request, service)
    keep, rescue = None, None
    if service.states is not None:
        rescue = Rescue(keeper(service, owner, ReturnState(ttl_s=_shutdown_ttl(service)), base))
    if fields.return_state is not None:
        keep = keeper(service, owner, fields.return_state, base)
    return StateSession(
        service.engine,
        owner=owner,
        store=service.states,
        layout=info.state_layout,
        base=None if base is None else base.head,
        base_of=base,
        keep=keep,
        turn=turn,
        cache=cache_use(owner, fields, points=cache_points),
        rescue=rescue,
    )


def _shutdown_ttl(service: Service) -> float:
    """Of the state of an answer that was cut off, seconds: nobody has asked for it."""
    ttl_s = time_to_live(service, None)
    return SHUTDOWN_TTL_S if ttl_s is None else min(ttl_s, SHUTDOWN_TTL_S)


def cache_use(owner: str, fields: StateFields, *, points: Sequence[int] = ()) -> CacheUse | None:
    """How a request uses the prefix cache; None: not at all."""
    if fields.cache_prompt is False:
        return None
    return CacheUse(owner, "" if fields.cache_salt is None else fields.cache_salt, tuple(points))


def keeper(service: Service, owner: str, wish: ReturnState, base: StateRecord | None) -> Keep:
    """Keeps the ends of answers as states."""
    store = require_store(service, param="return_state")

    async def keep(snapshot: SnapshotRecord) -> str:
        if wish.update and base is not None:
            return (await store.advance(base, snapshot)).id
        parent = None if base is None else base.id
        ttl_s = time_to_live(service, wish.ttl_s)
        return (await store.add(NewState(owner, snapshot, wish.name, parent, ttl_s))).id

    return keep


def time_to_live(service: Service, ttl_s: float | None) -> float | None:
    """Of a new state, seconds; None: for ever."""
    if ttl_s is not None:
        return ttl_s
    return service.options.state_ttl_s if service.options.state_ttl_s > 0 else None


def system_prefix(
    service: Service,
    messages: Sequence[MessageIn],
    prompt: Sequence[int],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[int, ...]:
    """Where the system prompt ends in a prompt, if the template makes it visible: no number, or one."""
    template, first = service.chat_template, messages[0]
    if template is None or first.role not in ("system", "developer") or len(messages) == 1:
        return ()
    try:
        system = ChatMessage(first.role, first.text, first.name)
        prefix = template.encode([system], tools=tools, add_generation_prompt=False)
    except TemplateFailure:
        return ()  # a template that wants a user's message first
    return (len(prefix),) if tuple(prompt[: len(prefix)]) == tuple(prefix) else ()


async def _check_name(request: Request, service: Service, name: str | None) -> None:
    """Refuses a taken name before anything is computed; whoever takes it meanwhile is noticed at the end."""
    store = require_store(service, param="return_state")
    if name is not None and await store.list_states(owner_of(request, service), limit=1, after=None, name=name):
        raise name_taken(name)


def _check_return(wish: ReturnState, num_choices: int) -> None:
    if num_choices > 1 and (wish.name is not None or wish.update):
        raise InvalidRequestError(
            f"`return_state` can name or update one state, and this request has {num_choices} answers",
            param="return_state",
        )
