"""What a request may wait for before it is scheduled: its grammar, the state that it begins from.

A request passes the stages in order, and the scheduler has it behind the last one. Some wait here once more after
their end, until their state is saved. Standard library only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from server.engine.sequence import FROM_NOTHING, StartState
from server.engine.types.requests import EngineError, FinishReason, GenerationRequest, TokenEvent


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that a stage has nothing more to do for, and the state that it begins from."""

    request: GenerationRequest
    start: StartState = FROM_NOTHING


class Stage(Protocol):
    """One thing that requests wait for."""

    @property
    def is_busy(self) -> bool:
        """Whether a request waits here."""

    def owns(self, request_id: str) -> bool:
        """Whether this request waits here."""

    def enter(self, request: GenerationRequest) -> Prepared | TokenEvent | None:
        """Takes a request in: prepared if it has nothing to wait for, its end if it is refused; None: it waits."""

    def cancel(self, request_id: str) -> bool:
        """Forgets a request that waits; False if it does not."""

    def wait(self, timeout_s: float) -> None:
        """Returns when somebody need not wait any more, or the time is over."""

    def arrived(self) -> tuple[list[Prepared], list[TokenEvent]]:
        """Requests that need not wait any more, and terminal events of those that end here."""


class OpenStage:
    """A stage where nobody waits; requests that `refusal` has something to say about end."""

    is_busy = False

    def refusal(self, request: GenerationRequest) -> EngineError | None:
        """Why a request cannot pass."""
        return None

    def owns(self, request_id: str) -> bool:
        return False

    def enter(self, request: GenerationRequest) -> Prepared | TokenEvent | None:
        error = self.refusal(request)
        return Prepared(request) if error is None else failed(request.request_id, error)

    def cancel(self, request_id: str) -> bool:
        return False

    def wait(self, timeout_s: float) -> None:
        """Returns at once."""

    def arrived(self) -> tuple[list[Prepared], list[TokenEvent]]:
        return [], []


class NoGrammars(OpenStage):
    """Of an engine that takes no grammars."""

    def refusal(self, request: GenerationRequest) -> EngineError | None:
        return None if request.grammar is None else EngineError("grammar_invalid", "this engine takes no grammars")


class Stages:
    """All stages of an engine, and the way from one to the next."""

    def __init__(self, *stages: Stage, schedule: Callable[[GenerationRequest, StartState], TokenEvent | None]) -> None:
        """
        Args:
            stages: in the order in which requests pass them.
            schedule: what comes behind the last one; returns the event of a request that it refuses.
        """
        self._stages = stages
        self._schedule = schedule

    @property
    def is_busy(self) -> bool:
        """Whether a request waits anywhere."""
        return any(stage.is_busy for stage in self._stages)

    def owns(self, request_id: str) -> bool:
        """Whether this request waits anywhere."""
        return any(stage.owns(request_id) for stage in self._stages)

    def enter(self, request: GenerationRequest) -> TokenEvent | None:
        """Sends a request on its way; its terminal event if it is refused at once."""
        return self._go_on(Prepared(request), self._stages)

    def cancel(self, request_id: str) -> bool:
        """Forgets a request that waits; False if it does not."""
        return any(stage.cancel(request_id) for stage in self._stages)

    def collect(self, *, wait_s: float) -> list[TokenEvent]:
        """Sends on whoever need not wait any more, after waiting so long for one; returns events of those that end."""
        busy = [stage for stage in self._stages if stage.is_busy]
        if busy and wait_s > 0:
            busy[-1].wait(wait_s)
        events: list[TokenEvent] = []
        for number, stage in enumerate(self._stages, 1):
            if stage.is_busy:
                passed, ended = stage.arrived()
                refused = [self._go_on(item, self._stages[number:]) for item in passed]
                events += [*ended, *(event for event in refused if event is not None)]
        return events

    def _go_on(self, prepared: Prepared, ahead: tuple[Stage, ...]) -> TokenEvent | None:
        for stage in ahead:
            outcome = stage.enter(prepared.request)
            if not isinstance(outcome, Prepared):
                return outcome
            prepared = outcome
        return self._schedule(prepared.request, prepared.start)


def failed(request_id: str, error: EngineError) -> TokenEvent:
    """The terminal event of a request that an error ends."""
    return TokenEvent(request_id, finish_reason=FinishReason.ERROR, error=error)
