"""Requests that have not had their terminal event: whose they are, whether there is a place for one more, and who hears
of their events. Lives longer than an engine process: what no process has begun yet goes to the next one.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from server.engine.types.requests import EngineConfig, EngineError, FinishReason, GenerationRequest, TokenEvent
from server.errors import InvalidRequestError, OverloadedError, RateLimitError

OnEvent = Callable[[TokenEvent], None]
OnBegun = Callable[[str], None]
_RETRY_AFTER_S = 1


class EventStream:
    """The events of one request; ends after the terminal one."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._has_ended = False
        self._is_read = False

    @property
    def has_ended(self) -> bool:
        """Whether the terminal event was pushed."""
        return self._has_ended

    def push(self, event: TokenEvent) -> None:
        """Adds an event."""
        self._has_ended = event.finish_reason is not None
        self._events.put_nowait(event)

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._is_read:
            raise StopAsyncIteration
        event = await self._events.get()
        self._is_read = event.finish_reason is not None
        return event


class TenantLoad(NamedTuple):
    """How many requests of a tenant have had a slot, and how many have not."""

    num_running: int
    num_waiting: int


@dataclass(slots=True)
class Submission:
    """One request.

    Attributes:
        name: the engine's, of this submission alone.
        request: the client's.
        on_event: is called with its events, under the client's name.
        on_begun: is called with that name when it gets its slot.
        has_begun: it has had a slot.
        num_processes: engine processes that were given it.
    """

    name: str
    request: GenerationRequest
    on_event: OnEvent
    on_begun: OnBegun
    has_begun: bool = False
    num_processes: int = 1

    @property
    def named(self) -> GenerationRequest:
        """The request as the engine knows it."""
        return replace(self.request, request_id=self.name)


class Submissions:
    """See the module."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._by_name: dict[str, Submission] = {}
        self._request_ids: set[str] = set()
        self._num_of: Counter[str] = Counter()
        self._num_waiting_of: Counter[str] = Counter()
        self._num_tokens_of: Counter[str] = Counter()
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def loads(self) -> dict[str, TenantLoad]:
        """What each tenant has here that has anything."""
        waiting = self._num_waiting_of
        return {name: TenantLoad(num - waiting[name], waiting[name]) for name, num in self._num_of.items()}

    def check(self, request: GenerationRequest, *, num_slots: int) -> None:
        """Raises an error unless there is a place for one more request beside `num_slots` that run.

        Raises:
            InvalidRequestError: another request of this id has not ended.
            OverloadedError: as many requests wait as may.
            RateLimitError: as many of this tenant.
        """
        if request.request_id in self._request_ids:
            raise InvalidRequestError(f"request_id {request.request_id!r} is in use", param="request_id")
        tenant, name = request.tenant, request.tenant.name
        num, num_waiting = len(self._by_name), self._num_waiting_of[name]
        limit = num_slots + self._config.max_waiting - (self._config.reserved_waiting if num_waiting else 0)
        if num >= limit:
            raise OverloadedError(f"at capacity: {num} requests running or queued, limit {limit}")
        own_limit = (tenant.max_running or num_slots) + tenant.max_waiting
        if tenant.max_waiting and self._num_of[name] >= own_limit:
            message = f"{self._num_of[name]} requests of this key are running or queued, limit {own_limit}"
            raise RateLimitError(message, retry_after_s=_RETRY_AFTER_S)
        num_tokens = self._num_tokens_of[name] + len(request.prompt_token_ids)
        if num_waiting and 0 < tenant.max_waiting_tokens < num_tokens:
            message = f"{num_tokens:,} prompt tokens of this key would be queued, limit {tenant.max_waiting_tokens:,}"
            raise RateLimitError(message, retry_after_s=_RETRY_AFTER_S)

    def add(self, request: GenerationRequest, on_event: OnEvent, on_begun: OnBegun) -> Submission:
        """Takes a request in that was checked.

        The engine knows each submission by a name of its own: a late event of an earlier request that was called the
        same can then never reach this one.
        """
        submission = Submission(f"{self._num_added}/{request.request_id}", request, on_event, on_begun)
        self._num_added += 1
        self._by_name[submission.name] = submission
        self._request_ids.add(request.request_id)
        self._num_of[request.tenant.name] += 1
        self._wait(submission, 1)
        return submission

    def begun(self, names: Iterable[str]) -> None:
        """Notes requests that have a slot."""
        for name in names:
            submission = self._by_name.get(name)
            if submission is not None and not submission.has_begun:
                self._wait(submission, -1)
                submission.has_begun = True
                submission.on_begun(submission.request.request_id)

    def pass_on(self, event: TokenEvent) -> None:
        """Passes an event of the engine on; it belongs to nobody if its request was ended here before."""
        submission = self._by_name.get(event.request_id)
        if submission is not None:
            if event.finish_reason is not None:
                self._forget(submission)
            submission.on_event(replace(event, request_id=submission.request.request_id))

    def end(self, name: str, event: TokenEvent) -> bool:
        """Ends a request here; False if it has ended."""
        if name not in self._by_name:
            return False
        self.pass_on(replace(event, request_id=name))
        return True

    def end_all(self, event: TokenEvent, *, begun_only: bool = False) -> None:
        """Ends all requests, or those that the engine had begun, or has now lost for the second time."""
        for submission in [*self._by_name.values()]:
            if not begun_only or submission.has_begun or submission.num_processes > 1:
                self.end(submission.name, event)

    def take_again(self) -> list[GenerationRequest]:
        """What a new engine process is to be given: requests that the one before had not begun."""
        for submission in self._by_name.values():
            submission.num_processes += 1
        return [submission.named for submission in self._by_name.values()]

    def name_of(self, request_id: str) -> str | None:
        """The engine's name of a client's request; None if that has ended."""
        found = (name for name, one in self._by_name.items() if one.request.request_id == request_id)
        return next(found, None)

    def _forget(self, submission: Submission) -> None:
        del self._by_name[submission.name]
        self._request_ids.discard(submission.request.request_id)
        self._num_of[submission.request.tenant.name] -= 1
        if not submission.has_begun:
            self._wait(submission, -1)

    def _wait(self, submission: Submission, change: int) -> None:
        """Counts a request in or out that waits."""
        tenant = submission.request.tenant.name
        self._num_waiting_of[tenant] += change
        self._num_tokens_of[tenant] += change * len(submission.request.prompt_token_ids)
        if self._num_of[tenant] == 0:
            for counter in (self._num_of, self._num_waiting_of, self._num_tokens_of):
                del counter[tenant]


def engine_died() -> TokenEvent:
    """The end of a request whose process is gone."""
    message = "the engine failed while this request ran and is being restarted; send the request again"
    return TokenEvent("", finish_reason=FinishReason.ERROR, error=EngineError("engine_restarting", message))
