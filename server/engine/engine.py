"""The synchronous core: requests in, token events out. No thread, no torch, no clock but for the statistics.

`step()` plans and launches a step, then takes in the oldest one in flight. With `num_ahead` = 1 the next
step is already on its way to the device when the tokens of this one are read back.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from server.engine.batch import Batch, StepResult
from server.engine.scheduler import NUMERICAL_ERROR, Scheduler
from server.engine.sequence import Sequence
from server.engine.stages import NoGrammars, Stage, Stages
from server.engine.state.snapshots import NoSnapshots, Snapshots
from server.engine.state.watch import NoWatch, StateWatch
from server.engine.types.position_stats import STEP_BUCKETS_S, PositionRecorder
from server.engine.types.requests import (
    EngineError,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationRequest,
    TokenEvent,
)

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
    """A scheduler and a runner that take turns.

    Attributes:
        on_begin: called with the ids of requests that have got their first slot, before the step in which they begin.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: Runner,
        info: EngineInfo,
        num_ahead: int = 0,
        snapshots: Snapshots | None = None,
        grammars: Stage | None = None,
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
        self.on_begin: Callable[[list[str]], None] = lambda request_ids: None
        self._scheduler = scheduler
        self._runner = runner
        self._num_ahead = num_ahead
        self._snapshots = NoSnapshots() if snapshots is None else snapshots
        self._stages = Stages(NoGrammars() if grammars is None else grammars, self._snapshots, schedule=scheduler.add)
        self._watch = NoWatch() if watch is None else watch
        self._in_flight: deque[Batch] = deque()
        self._num_steps = 0
        self._num_prefill_tokens = 0
        self._num_decode_tokens = 0
        self._step_time_s = self._longest_step_s = 0.0
        self._token_times = PositionRecorder(STEP_BUCKETS_S)
        self._num_not_finite = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return self._is_computing or self._stages.is_busy

    @property
    def _is_computing(self) -> bool:
        return bool(self._in_flight) or self._scheduler.has_unfinished

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
            longest_step_s=self._longest_step_s,
            num_drafted_tokens=self._scheduler.num_drafted,
            num_accepted_tokens=self._scheduler.num_accepted,
            num_preemptions=self._scheduler.num_preemptions,
            preempted_bytes=self._scheduler.num_parked * self.info.state_bytes_per_slot,
            prefix_cache=self._snapshots.cache_stats,
            token_times=self._token_times.histogram(),
            state_norms=self._watch.norms,
            largest_state_norm=self._watch.largest_norm,
            num_not_finite=self._num_not_finite,
        )

    def add(self, request: GenerationRequest) -> TokenEvent | None:
        """Takes a request in; returns its terminal event at once if it is refused.

        Raises:
            ValueError: a request of this id has not ended yet.
        """
        if self._scheduler.has(request.request_id) or self._stages.owns(request.request_id):
            raise ValueError(f"request {request.request_id!r} is already in the engine")
        return self._stages.enter(request)

    def abort(self, request_id: str) -> TokenEvent | None:
        """Ends a request; its terminal event, or None if it is unknown or has ended."""
        if self._stages.cancel(request_id):
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
        if self._snapshots.is_saving(request_id):
            return []
        if self._stages.cancel(request_id):
            return [TokenEvent(request_id, finish_reason=FinishReason.SUSPENDED)]
        events = self._settle()
        if (sequence := self._scheduler.find(request_id)) is not None:
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
        self._snapshots.reset_cache()

    def step(self) -> list[TokenEvent]:
        """One turn. An exception from here leaves the engine unusable."""
        events = self._stages.collect(wait_s=0.0 if self._is_computing else _IDLE_WAIT_S)
        started = time.monotonic()
        batch = self._scheduler.next_batch()
        if begun := self._scheduler.take_begun():
            self.on_begin(begun)
        if batch is not None:
            self._runner.launch(batch)
            self._in_flight.append(batch)
            self._snapshots.launched(batch)
        committed = None
        if self._in_flight and (batch is None or len(self._in_flight) > self._num_ahead):
            committed = self._in_flight.popleft()
            events += self._commit(committed)
            self._runner.complete()
        self._time(committed, time.monotonic() - started, events)
        return events + self._watch_states()

    def _time(self, batch: Batch | None, elapsed_s: float, events: list[TokenEvent]) -> None:
        """Notes what a step took, and what a token cost where it stands; `batch`: the one that was committed in it."""
        self._step_time_s += elapsed_s
        self._longest_step_s = max(self._longest_step_s, elapsed_s)
        if batch is None:
            return
        self._scheduler.observe(batch, elapsed_s)
        num_known = batch.num_decode + batch.num_verified
        if num_known < len(batch.chunks):
            return  # steps that read prompts too say nothing about single tokens
        self._token_times.observe_all([chunk.position for chunk in batch.chunks[: batch.num_decode]], elapsed_s)
        for chunk in batch.chunks[batch.num_decode :]:
            name = chunk.sequence.request_id
            num_tokens = next((len(event.token_ids) for event in events if event.request_id == name), 0)
            if num_tokens > 0:
                self._token_times.observe(chunk.position, elapsed_s / num_tokens, times=num_tokens)

    def _watch_states(self) -> list[TokenEvent]:
        """Ends the conversation whose state was found not to be finite, alone."""
        ill = self._watch.turn(self._scheduler.running)
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
            if event is not None and self._snapshots.end(sequence, event):
                del events[sequence.request_id]  # it comes when the state is on the disk
            self._runner.release(sequence)
