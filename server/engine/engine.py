"""The synchronous core: requests in, token events out. No thread, no torch, no clock but for the statistics.

`step()` plans and launches a step, then takes in the oldest one in flight. With `num_ahead` = 1 the next
step is already on its way to the device when the tokens of this one are read back.
"""

import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from server.engine.batch import Batch, StepResult
from server.engine.scheduler import NUMERICAL_ERROR, Scheduler
from server.engine.sequence import Sequence
from server.engine.state.snapshots import Snapshots
from server.engine.state.watch import StateWatch
from server.engine.types.position_stats import NOTHING_OBSERVED, STEP_BUCKETS_S, PositionRecorder
from server.engine.types.requests import (
    EngineError,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationRequest,
    TokenEvent,
)
from server.engine.types.state import NO_PREFIX_CACHE

if TYPE_CHECKING:  # needs the grammar library, which an engine without grammars does without
    from server.engine.grammars.queue import GrammarQueue

_IDLE_WAIT_S = 0.02


class Runner(Protocol):
    """What runs the steps: `server.engine.runner.ModelRunner`, or a test's own."""

    def launch(self, batch: Batch) -> None:
        """Starts a step."""

    def collect(self) -> StepResult:
        """Waits for the oldest step that was not collected yet."""

    def complete(self) -> None:
        """Samples a launched step that waited for the one before it to be committed."""

    def release(self, sequence: Sequence) -> None:
        """Clears what an ended sequence left on the device."""


class Engine:
    """A scheduler and a runner that take turns."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: Runner,
        info: EngineInfo,
        num_ahead: int = 0,
        snapshots: Snapshots | None = None,
        grammars: "GrammarQueue | None" = None,
        watch: StateWatch | None = None,
    ) -> None:
        """
        Args:
            scheduler: what runs next.
            runner: what runs it.
            info: what this engine says about itself.
            num_ahead: steps to launch before the oldest one is read back; 0 where the device is the host.
            snapshots: saved and cached states; None: requests that name any end with an error.
            grammars: where requests wait for their grammar; None: those that have one end with an error.
            watch: looks at the states of running conversations; None: only logits are looked at.
        """
        self.info = info
        self._grammars = grammars
        self._snapshots = snapshots
        self._scheduler = scheduler
        self._runner = runner
        self._num_ahead = num_ahead
        self._in_flight: deque[Batch] = deque()
        self._num_steps = 0
        self._num_prefill_tokens = 0
        self._num_decode_tokens = 0
        self._step_time_s = 0.0
        self._token_times = PositionRecorder(STEP_BUCKETS_S)
        self._watch = watch
        self._num_not_finite = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return (
            bool(self._in_flight) or self._scheduler.has_unfinished or self._waits_for_files or self._waits_to_compile
        )

    @property
    def stats(self) -> EngineStats:
        """Gauges of this moment and totals since the start."""
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_free_slots=self._scheduler.num_free_slots,
            num_steps=self._num_steps,
            num_prefill_tokens=self._num_prefill_tokens,
            num_decode_tokens=self._num_decode_tokens + self._scheduler.num_accepted,
            step_time_s=self._step_time_s,
            num_drafted_tokens=self._scheduler.num_drafted,
            num_accepted_tokens=self._scheduler.num_accepted,
            prefix_cache=NO_PREFIX_CACHE if self._snapshots is None else self._snapshots.cache_stats,
            token_times=self._token_times.histogram(),
            state_norms=NOTHING_OBSERVED if self._watch is None else self._watch.norms,
            largest_state_norm=0.0 if self._watch is None else self._watch.largest_norm,
            num_not_finite=self._num_not_finite,
        )

    def add(self, request: GenerationRequest) -> TokenEvent | None:
        """Takes a request in; returns its terminal event at once if it is refused.

        Raises:
            ValueError: a request of this id has not ended yet.
        """
        if self._has(request.request_id):
            raise ValueError(f"request {request.request_id!r} is already in the engine")
        if request.grammar is not None and self._grammars is None:
            error = EngineError("grammar_invalid", "this engine takes no grammars")
            return TokenEvent(request.request_id, finish_reason=FinishReason.ERROR, error=error)
        if self._grammars is not None and self._grammars.take(request):
            return None
        return self._add_compiled(request)

    def abort(self, request_id: str) -> TokenEvent | None:
        """Ends a request; its terminal event, or None if it is unknown or has ended."""
        waiting = [queue for queue in (self._grammars, self._snapshots) if queue is not None]
        if any(queue.cancel(request_id) for queue in waiting):
            return TokenEvent(request_id, finish_reason=FinishReason.ABORT)
        event = self._scheduler.abort(request_id)
        self._release_ended({})
        return event

    def suspend(self, request_id: str, *, save_to: str | None, note: str, in_prompt: bool) -> list[TokenEvent]:
        """Ends a request with `SUSPENDED`; what was under way for others is read back first.

        Args:
            save_to: file for its state, if it has one; None: it is not saved.
            note: to be kept in the file.
            in_prompt: save it too while more of its prompt is to be read than a file can hold; only the server itself,
                which knows the prompt, can go on from there.

        Returns:
            What has happened, to anybody. Its own terminal event may come later, when the state is on the disk; a
            request that was just ending anyway ends as it would have.
        """
        if self._snapshots is not None and self._snapshots.is_saving(request_id):
            return []
        waiting = [queue for queue in (self._grammars, self._snapshots) if queue is not None]
        if any(queue.cancel(request_id) for queue in waiting):
            return [TokenEvent(request_id, finish_reason=FinishReason.SUSPENDED)]
        events = self._settle()
        for sequence in self._scheduler.running:
            if sequence.request_id == request_id:
                sequence.save_on_end(save_to if in_prompt or sequence.is_past_prompt else None, note)
        event = self._scheduler.abort(request_id)
        if event is None:
            return events
        ended = {request_id: replace(event, finish_reason=FinishReason.SUSPENDED)}
        self._release_ended(ended)
        return [*events, *ended.values()]

    def _settle(self) -> list[TokenEvent]:
        """Reads back every step that is in flight, so that each sequence has seen its last token."""
        events: list[TokenEvent] = []
        while self._in_flight:
            events += self._commit(self._in_flight.popleft())
            self._runner.complete()
        return events

    def reset_cache(self) -> None:
        """Forgets every cached prefix."""
        if self._snapshots is not None:
            self._snapshots.reset_cache()

    def step(self) -> list[TokenEvent]:
        """One turn. An exception from here leaves the engine unusable."""
        events = self._take_compiled() + self._take_files()
        started = time.monotonic()
        batch = self._scheduler.next_batch()
        if batch is not None:
            self._runner.launch(batch)
            self._in_flight.append(batch)
            if self._snapshots is not None:
                self._snapshots.launched(batch)
        committed = None
        if self._in_flight and (batch is None or len(self._in_flight) > self._num_ahead):
            committed = self._in_flight.popleft()
            events += self._commit(committed)
            self._runner.complete()
        elapsed_s = time.monotonic() - started
        self._step_time_s += elapsed_s
        if committed is not None:
            self._time_tokens(committed, elapsed_s, events)
            self._scheduler.observe(committed, elapsed_s)
        return events + self._watch_states()

    def _time_tokens(self, batch: Batch, elapsed_s: float, events: list[TokenEvent]) -> None:
        """Notes what a token cost where it stands; steps that read prompts too say nothing about that."""
        num_known = batch.num_decode + batch.num_verified
        if num_known < len(batch.chunks):
            return
        self._token_times.observe_all([chunk.position for chunk in batch.chunks[: batch.num_decode]], elapsed_s)
        for chunk in batch.chunks[batch.num_decode :]:
            name = chunk.sequence.request_id
            num_tokens = next((len(event.token_ids) for event in events if event.request_id == name), 0)
            if num_tokens > 0:
                self._token_times.observe(chunk.position, elapsed_s / num_tokens, times=num_tokens)

    def _watch_states(self) -> list[TokenEvent]:
        """Ends the conversation whose state was found not to be finite, alone."""
        ill = None if self._watch is None else self._watch.turn(self._scheduler.running)
        if ill is None or self._scheduler.abort(ill.request_id) is None:
            return []
        self._release_ended({})
        self._num_not_finite += 1
        error = EngineError(NUMERICAL_ERROR, "the state of this conversation was not finite")
        return [TokenEvent(ill.request_id, finish_reason=FinishReason.ERROR, error=error)]

    def _commit(self, batch: Batch) -> list[TokenEvent]:
        result = self._runner.collect()
        committed = self._scheduler.commit(batch, result.token_ids, result.faults, result.logprobs)
        events = {event.request_id: event for event in committed}
        if True in result.faults:
            self._num_not_finite += sum(
                event.error is not None and event.error.code == NUMERICAL_ERROR for event in committed
            )
        self._release_ended(events)
        self._num_steps += 1
        self._num_prefill_tokens += batch.num_prefill_tokens
        self._num_decode_tokens += batch.num_decode + batch.num_verified
        return [*events.values()]

    def _release_ended(self, events: dict[str, TokenEvent]) -> None:
        """Clears the slots of ended sequences; takes out the events of those whose state is still being saved."""
        for sequence in self._scheduler.take_ended():
            event = events.get(sequence.request_id)
            if self._snapshots is not None and event is not None and self._snapshots.end(sequence, event):
                del events[sequence.request_id]  # it comes when the state is on the disk
            self._runner.release(sequence)

    def _has(self, request_id: str) -> bool:
        waiting = [queue for queue in (self._grammars, self._snapshots) if queue is not None]
        return self._scheduler.has(request_id) or any(queue.owns(request_id) for queue in waiting)

    def _add_compiled(self, request: GenerationRequest) -> TokenEvent | None:
        snapshots = self._snapshots
        if snapshots is not None and request.states.load_from is not None:
            return snapshots.load(request)
        if snapshots is not None and snapshots.fetch(request):
            return None
        return self._scheduler.add(request)

    @property
    def _waits_to_compile(self) -> bool:
        return self._grammars is not None and self._grammars.is_busy

    def _take_compiled(self) -> list[TokenEvent]:
        """Schedules requests whose grammar was compiled; events of those whose grammar cannot be used."""
        grammars = self._grammars
        if grammars is None or not grammars.is_busy:
            return []
        if not (self._in_flight or self._scheduler.has_unfinished or self._waits_for_files):
            grammars.wait(_IDLE_WAIT_S)
        requests, events = grammars.arrived()
        refused = [self._add_compiled(request) for request in requests]
        return [*events, *(event for event in refused if event is not None)]

    @property
    def _waits_for_files(self) -> bool:
        return self._snapshots is not None and self._snapshots.is_busy

    def _take_files(self) -> list[TokenEvent]:
        """Schedules requests whose state was read; events of requests whose state was written, or could not be."""
        snapshots = self._snapshots
        if snapshots is None or not snapshots.is_busy:
            return []
        if not (self._in_flight or self._scheduler.has_unfinished):
            snapshots.wait(_IDLE_WAIT_S)
        loaded, events = snapshots.arrived()
        refused = [self._scheduler.add(item.request, item.start) for item in loaded]
        return [*events, *(event for event in refused if event is not None)]
