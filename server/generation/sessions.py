"""From a request's state fields to its session: whose states, which one to begin from, and how to keep the ends."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.types.requests import EngineInfo
from server.errors import InvalidRequestError
from server.protocol.sampling import GenerationFields
from server.protocol.states import ReturnState, StateFields
from server.service import Service
from server.states.errors import name_taken
from server.states.session import CacheUse, Keep, Rescue
from server.states.store import NewState, ResponseRecord, SnapshotRecord, StateRecord, StateStore

SHUTDOWN_TTL_S = 86_400.0


def require_store(service: Service, *, param: str | None) -> StateStore:
    """Raises a 400 where no states are kept."""
    if service.states is None:
        raise InvalidRequestError("this server saves no states", param=param, code="states_unavailable")
    return service.states


@dataclass(frozen=True, slots=True)
class Past:
    """Where the conversation of a request begins, and what becomes of its states.

    Attributes:
        base: the snapshot that it comes after; None: it begins with the prompt.
        base_of: the state or response that this is of.
        keep: what becomes of the state at the end of each answer; None: it is not saved.
        rescue: likewise of answers that are cut off because the server stops; None: nothing is kept then.
        cut_off_at: of an answer that was cut off and is resumed: its state then; None: it had none.
        prompts: tokens that come after the base, where they are known already.
        shows_tools: whether the model is told of the tools where its template has a place for them.
        uses_cache: whether the prefix cache is used and filled.
    """

    base: SnapshotRecord | None = None
    base_of: StateRecord | ResponseRecord | None = None
    keep: Keep | None = None
    rescue: Rescue | None = None
    cut_off_at: SnapshotRecord | None = None
    prompts: Sequence[tuple[int, ...]] | None = None
    shows_tools: bool = True
    uses_cache: bool = True


async def find_past(service: Service, info: EngineInfo, owner: str, fields: GenerationFields) -> Past:
    """The past of a request that names states itself.

    Raises:
        NotFoundError: there is no state of that id, or it is another owner's.
        InvalidRequestError: it is another model's, or the fields contradict each other.
        StateConflictError: the name for the new state is taken.
    """
    if fields.return_state is not None:
        _check_return(fields.return_state, fields.num_prompts * fields.num_choices)
        await _check_name(service, owner, fields.return_state.name)
    base = None
    if fields.state_id is not None:
        base = await require_store(service, param="state_id").use(owner, fields.state_id)
        check_fingerprint(base.head, info)
    return Past(
        base=None if base is None else base.head,
        base_of=base,
        keep=None if fields.return_state is None else _keeper(service, owner, fields.return_state, base),
        rescue=None if service.states is None else Rescue(_keeper(service, owner, _shutdown_wish(service), base)),
    )


def check_fingerprint(snapshot: SnapshotRecord, info: EngineInfo) -> None:
    """Raises a 400 for a state of another model."""
    if info.state_layout is None or snapshot.fingerprint != info.state_layout.fingerprint:
        raise InvalidRequestError("this is a state of another model", param="state_id", code="state_of_another_model")


def _shutdown_wish(service: Service) -> ReturnState:
    """For the state of an answer that was cut off, which nobody has asked for."""
    ttl_s = time_to_live(service, None)
    return ReturnState(ttl_s=SHUTDOWN_TTL_S if ttl_s is None else min(ttl_s, SHUTDOWN_TTL_S))


def cache_use(owner: str, fields: StateFields, *, points: Sequence[int] = ()) -> CacheUse | None:
    """How a request uses the prefix cache; None: not at all."""
    if fields.cache_prompt is False:
        return None
    return CacheUse(owner, "" if fields.cache_salt is None else fields.cache_salt, tuple(points))


def _keeper(service: Service, owner: str, wish: ReturnState, base: StateRecord | None) -> Keep:
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


async def _check_name(service: Service, owner: str, name: str | None) -> None:
    """Refuses a taken name before anything is computed; whoever takes it meanwhile is noticed at the end."""
    store = require_store(service, param="return_state")
    if name is not None and await store.list_states(owner, limit=1, after=None, name=name):
        raise name_taken(name)


def _check_return(wish: ReturnState, num_choices: int) -> None:
    if num_choices > 1 and (wish.name is not None or wish.update):
        raise InvalidRequestError(
            f"`return_state` can name or update one state, and this request has {num_choices} answers",
            param="return_state",
        )
