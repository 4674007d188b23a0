"""The states of one request: the one it begins from, and those its answers leave behind.

A session is made when the request is understood, and opened when the request is admitted: then the file it begins from
is held, and room is kept for the files that its answers will write.
"""

import hashlib
import json
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from server.engine.types.requests import (
    ANYBODY,
    EngineError,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Tenant,
    TokenEvent,
)
from server.engine.types.state import Resumption, SavedState, StateLayout, StateOptions
from server.errors import (
    EngineUnavailableError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ServiceError,
)
from server.states.errors import DiskFullError
from server.states.store import ResponseRecord, SnapshotRecord, StateRecord, StateStore, TurnEnd

HEADER_BYTES = 64 << 10
"""What a state's file is larger than its tensors, at most; room for it is kept."""
_log = logging.getLogger(__name__)
_PREFILL = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
Keep = Callable[[SnapshotRecord], Awaitable[str]]
"""Puts a written snapshot where it is to be found again; the id of that place."""


@dataclass(frozen=True, slots=True)
class Rescue:
    """What becomes of the state of an answer that is cut off because the server stops.

    Attributes:
        keep: as at the end of an answer.
        is_own: the server itself goes on with the answer, and knows all of its tokens: then it may be cut off while its
            prompt is read, too.
        in_any_form: whether a state is of use though the answer is bound to a grammar, which begins anew with a client.
    """

    keep: Keep
    is_own: bool = False
    in_any_form: bool = False


class SubmittingEngine(Protocol):
    """What is needed of the engine client here."""

    def submit(self, request: GenerationRequest) -> AbstractAsyncContextManager[AsyncIterator[TokenEvent]]: ...


@dataclass(frozen=True, slots=True)
class CacheUse:
    """How a request uses the prefix cache.

    Attributes:
        owner: whose prefixes are seen.
        salt: what else they must have in common.
        points: lengths of prefixes that other prompts are likely to share.
    """

    owner: str
    salt: str = ""
    points: tuple[int, ...] = ()

    def namespace(self, base: SnapshotRecord | None) -> str:
        """Of prompts that follow the state `base`."""
        parts = (self.owner, self.salt, "" if base is None else base.file)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class StateSession:
    """See the module.

    Attributes:
        base: where the conversation begins; None: nowhere.
    """

    def __init__(
        self,
        engine: SubmittingEngine,
        *,
        owner: str,
        store: StateStore | None = None,
        layout: StateLayout | None = None,
        base: SnapshotRecord | None = None,
        base_of: StateRecord | ResponseRecord | None = None,
        keep: Keep | None = None,
        turn: TurnEnd = TurnEnd.TEXT,
        cache: CacheUse | None = None,
        rescue: Rescue | None = None,
        cut_off_at: SnapshotRecord | None = None,
        tenant: Tenant = ANYBODY,
    ) -> None:
        """
        Args:
            engine: feeds what must be fed again.
            owner: whose states they are.
            store: of the states; needed with `base` or `keep`.
            layout: what states of the model look like; likewise.
            base: a snapshot to begin from.
            base_of: the state or response that it is of, which does not expire while it is used.
            keep: what becomes of the state at the end of each answer; None: it is not saved.
            turn: where the saved states end.
            cache: None: neither used nor filled.
            rescue: for when the server stops; None: nothing is kept then.
            cut_off_at: of an answer that was cut off and is gone on with: its state then; None: it had none.
            tenant: whose the requests are.
        """
        self.base = base
        self._engine = engine
        self._owner = owner
        self._store = store
        self._layout = layout
        self._keep = keep
        self._turn = turn
        self._cache = cache
        self.rescue = rescue
        self._base_of = base_of
        self._cut_off_at = cut_off_at
        self._tenant = tenant
        self._files: tuple[str, ...] = ()

    @property
    def num_past_tokens(self) -> int:
        """Tokens of the conversation before the prompt."""
        return 0 if self.base is None else self.base.num_tokens

    @property
    def num_fed_tokens(self) -> int:
        """Those of them that are not fed again."""
        return 0 if self.base is None else self.base.position

    @property
    def keeps(self) -> bool:
        """Whether answers leave states behind."""
        return self._keep is not None

    @asynccontextmanager
    async def opened(self, num_answers: int) -> AsyncIterator[None]:
        """Holds and reserves files for as long as the context is open.

        Raises:
            StorageFullError: there is no room for the states of that many answers.
        """
        begin = self.base if self._cut_off_at is None else self._cut_off_at
        if self._store is None or (begin is None and self._keep is None):
            yield
            return
        if begin is None:
            async with self._room(num_answers):
                yield
            return
        async with self._store.hold(begin, of=self._base_of), self._room(num_answers):
            yield

    def attach(self, request: GenerationRequest, number: int) -> GenerationRequest:
        """The engine's request for answer `number`, with its states; the session is open."""
        states = StateOptions(
            load_from=None if self.base is None else self.base.file,
            save_to=self._files[number] if self.keeps else None,
            note=self.note if self.keeps else "",
            cache_namespace=None if self._cache is None else self._cache.namespace(self.base),
            cache_points=() if self._cache is None else self._cache.points,
        )
        return replace(request, states=states, tenant=self._tenant)

    def resumed(self, request: GenerationRequest, outputs: Sequence[int]) -> GenerationRequest:
        """The engine's request for an answer that was cut off behind these tokens."""
        prompt, num_fed, states = request.prompt_token_ids, 0, request.states
        if self._cut_off_at is not None:
            prompt = prompt if self.base is None else (*self.base.pending, *prompt)
            num_fed = self._cut_off_at.position - self.num_fed_tokens
            states = replace(states, load_from=self._cut_off_at.file)
        resumption = Resumption(len(outputs), num_fed)
        return replace(request, prompt_token_ids=(*prompt, *outputs), states=states, resumed=resumption)

    async def keep(self, saved: SavedState) -> str:
        """Keeps what the engine has saved; the id."""
        assert self._keep is not None
        return await self._keep(self._record_of(saved))

    async def keep_rescued(self, saved: SavedState) -> str:
        """Keeps what the engine has saved of an answer that is cut off; the id."""
        assert self.rescue is not None
        return await self.rescue.keep(self._record_of(saved))

    @asynccontextmanager
    async def room_to_stop(self, num_answers: int) -> AsyncIterator[tuple[str | None, ...]]:
        """Files for the states of answers that are cut off; None for each where there is no room for them."""
        async with AsyncExitStack() as stack:
            files: tuple[str | None, ...] = (None,) * num_answers
            if self._store is not None and self._layout is not None and self.rescue is not None:
                try:
                    bytes_each = self._layout.num_data_bytes + HEADER_BYTES
                    room = await stack.enter_async_context(
                        self._store.room(num_answers, bytes_each=bytes_each, owner=self._owner)
                    )
                    files = room.files
                except ServiceError as error:
                    _log.error("no room for the states of answers that are cut off: %s", error)
            yield files

    @property
    def note(self) -> str:
        """What is noted in files, for those who go on from them."""
        return json.dumps({"turn": self._turn})

    def _record_of(self, saved: SavedState) -> SnapshotRecord:
        assert self._layout is not None
        return SnapshotRecord(
            file=saved.file,
            position=saved.position,
            pending=saved.pending,
            last_token=saved.last_token,
            turn=self._turn,
            num_bytes=saved.num_bytes,
            fingerprint=self._layout.fingerprint,
        )

    async def feed(self, prompt: tuple[int, ...], number: int) -> tuple[SavedState, int]:
        """Feeds a prompt and saves the state after it, generating nothing.

        Returns:
            What was saved, and how many of the prompt's tokens came from the prefix cache.

        Raises:
            ServiceError: the engine cannot do it.
        """
        request = self.attach(GenerationRequest(f"feed-{uuid.uuid4().hex}", prompt, _PREFILL), number)
        request = replace(request, states=replace(request.states, prompt_only=True))
        async with self._engine.submit(request) as events:
            async for event in events:
                if event.saved is not None:
                    return event.saved, event.num_cached_tokens
                if event.save_error is not None:
                    raise error_of(event.save_error)
                if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                    raise error_of(event.error)
        raise InternalError("the engine has not saved the state")

    @asynccontextmanager
    async def _room(self, num_answers: int) -> AsyncIterator[None]:
        if self._keep is None:
            yield
            return
        assert self._store is not None
        assert self._layout is not None
        bytes_each = self._layout.num_data_bytes + HEADER_BYTES
        async with self._store.room(num_answers, bytes_each=bytes_each, owner=self._owner) as room:
            self._files = room.files
            yield


def error_of(error: EngineError | None) -> ServiceError:
    """What a client is told when the engine gives up on its request."""
    if error is None:
        return EngineUnavailableError("the server stopped before the answer was complete", code="engine_stopped")
    match error.code:
        case "engine_restarting":
            return EngineUnavailableError(error.message, code=error.code)
        case "overloaded":
            return OverloadedError(error.message)
        case "grammar_invalid" | "grammar_failed":
            return InvalidRequestError(error.message, code=error.code)
        case "state_invalid" | "state_of_another_model" | "states_unavailable":
            return InvalidRequestError(error.message, param="state_id", code=error.code)
        case "state_not_found":
            return NotFoundError(error.message, param="state_id", code=error.code)
        case "state_storage_full":
            return DiskFullError()
        case _:
            return InternalError(error.message, code=error.code)
