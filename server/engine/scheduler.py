"""Who runs in the next step. Pure bookkeeping: no tensor, no clock, no thread.

Rules:
    - Continuous batching: every step takes all decoding sequences first, then chunks of prompts, until
      `max_step_tokens` are reached. Several prompts share a step; a prompt longer than its share goes on in the next
      one, and only its last chunk samples.
    - There are never more running sequences than tokens in a step, so decoding never starves.
    - Who gets a slot, and who gives one up, is `fairness.admission`'s to say; how prompts share the tokens of a step
      is `fairness.prompts`': every tenant by its weight, the oldest prompt of each at least a half of that.
    - Prompts take no more tokens of a step than the gap of answers allows (`fairness.step_times`). Time is given by
      `observe`; nothing here looks at a clock.
    - Prompts whose tokens are scored take at most `max_scored_tokens` of a step together, for each of those needs
      the logits of a whole vocabulary: the memory for them is fixed, however long the prompts are.
    - Every request that was added ends in exactly one terminal event.
    - A step may be planned while earlier ones are in flight: rows whose sequence has ended meanwhile are
      ignored by `commit`.
"""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import replace

from server.engine.batch import Batch
from server.engine.fairness.admission import Admission, Moves
from server.engine.fairness.prompts import PromptShares, StepBudget, until_first_token
from server.engine.fairness.step_times import StepTimes
from server.engine.request_faults import fault_of
from server.engine.sequence import FROM_NOTHING, Chunk, Sequence, SequenceStatus, StartState
from server.engine.speculation.drafts import num_confirmed
from server.engine.speculation.rules import Speculation
from server.engine.types.logprobs import NO_STEP_LOGPROBS, LogprobTable, StepLogprobs
from server.engine.types.requests import EngineError, FinishReason, GenerationRequest, TokenEvent

NUMERICAL_ERROR = "numerical_error"
"""Code of a request that ended because something in its computation was not finite."""


class Scheduler:
    """The engine's queue and its running set.

    Attributes:
        num_drafted, num_accepted: drafts that were verified since the start, and those that stood.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        max_step_tokens: int,
        max_waiting: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...] = (),
        max_scored_tokens: int | None = None,
        speculation: Speculation | None = None,
        max_unseen: int = 0,
        on_admission: Callable[[Sequence], None] = lambda sequence: None,
        reserved_waiting: int = 0,
        step_times: StepTimes | None = None,
        can_preempt: bool = True,
        max_parked: int | None = None,
    ) -> None:
        """
        Args:
            num_slots: sequences that may run together, 1 .. max_step_tokens.
            max_step_tokens: most tokens in a step.
            max_waiting: requests that may wait for a slot, >= 0.
            vocab_size: token ids are 0 .. vocab_size - 1.
            eos_token_ids: the model's end-of-sequence tokens.
            max_scored_tokens: most prompt tokens in a step whose logits are wanted, >= 1; None: any number.
            speculation: how next tokens are guessed; None: not at all.
            max_unseen: steps that may be planned for a sequence whose next token depends on its last before that was
                seen: 1 where the runner completes a step after the one before it was committed, else 0.
            on_admission: called with a sequence that gets its slot, before its first tokens are scheduled; it may let
                the sequence begin behind a prefix whose state is known (`Sequence.skip`).
            reserved_waiting, can_preempt, max_parked: see `Admission`.
            step_times: limits the prompt tokens of steps in which answers run; None: they take what is left.

        Raises:
            ValueError: the numbers do not fit each other.
        """
        if num_slots > max_step_tokens:
            raise ValueError(f"{num_slots} slots need steps of at least as many tokens, not {max_step_tokens}")
        self._admission = Admission(
            num_slots=num_slots,
            max_waiting=max_waiting,
            reserved_waiting=reserved_waiting,
            can_preempt=can_preempt,
            max_parked=max_parked,
            on_admission=self._begin,
        )
        self._running, self._waiting = self._admission.running, self._admission.waiting
        self._num_slots, self._max_step_tokens = num_slots, max_step_tokens
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._max_scored_tokens = max_step_tokens if max_scored_tokens is None else max_scored_tokens
        self._speculation = speculation
        self._max_unseen = max_unseen
        self._on_admission = on_admission
        self._prompts = PromptShares()
        self._step_times = step_times
        self._ended: list[Sequence] = []
        self._begun: list[str] = []
        self._checked_prompt: tuple[int, ...] = ()
        self.num_drafted = self.num_accepted = 0

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def running(self) -> Iterable[Sequence]:
        """The sequences that hold a slot."""
        return self._running.values()

    @property
    def num_free_slots(self) -> int:
        return self._admission.slots.num_free

    @property
    def num_preemptions(self) -> int:
        """Running sequences that had to wait again."""
        return self._admission.num_preemptions

    @property
    def num_parked(self) -> int:
        """Those of them whose state is kept meanwhile."""
        return self._admission.num_parked

    @property
    def has_unfinished(self) -> bool:
        """Whether any request still owes its terminal event."""
        return len(self._waiting) > 0 or len(self._running) > 0

    def has(self, request_id: str) -> bool:
        """Whether a request of this id has not ended yet."""
        return self.find(request_id) is not None

    def find(self, request_id: str) -> Sequence | None:
        """The sequence of a request that has not ended; None if there is none."""
        return self._admission.find(request_id)

    def add(self, request: GenerationRequest, start: StartState = FROM_NOTHING) -> TokenEvent | None:
        """Takes a request in; returns its terminal event at once if it cannot be taken.

        Args:
            request: what the client wants.
            start: the state that its prompt goes on from.

        Raises:
            ValueError: a request of this id has not ended yet.
        """
        request_id = request.request_id
        if self.has(request_id):
            raise ValueError(f"request {request_id!r} is already in the engine")
        is_checked = request.prompt_token_ids is self._checked_prompt  # which a whole group has in common
        fault = fault_of(request, self._vocab_size, checks_prompt=not is_checked)
        if fault is not None:
            return _failed(request_id, code="internal_error", message=fault)
        self._checked_prompt = request.prompt_token_ids
        refusal = self._admission.refusal(request.tenant, len(request.prompt_token_ids))
        if refusal is not None:
            return _failed(request_id, code="overloaded", message=refusal)
        self._admission.add(Sequence(request, self._eos_token_ids, start))
        return None

    def abort(self, request_id: str) -> TokenEvent | None:
        """Ends a request wherever it is; its terminal event, or None if it is unknown or has ended."""
        sequence = self.find(request_id)
        if sequence is None:
            return None
        self._end(sequence)
        return TokenEvent(request_id, finish_reason=FinishReason.ABORT)

    def next_batch(self) -> Batch | None:
        """Plans a step and counts its tokens as fed; None when nothing can be scheduled now."""
        if len(self._waiting) == 0:
            moves = self._admission.fill(0)
        else:
            num_rows = sum(sequence.wants_decode for sequence in self._running.values())
            moves = self._admission.fill(max(1, self._prompt_tokens(num_rows, num_rows)))
        decoding, verifying = self._decode()
        prompts = self._read(moves, decoding, verifying)
        batch = Batch.of(decoding, verifying, prompts)
        if batch is None or not (moves.preempted or moves.resumed):
            return batch
        return replace(batch, preempted=tuple(moves.preempted), resumed=tuple(moves.resumed))

    def commit(
        self,
        batch: Batch,
        token_ids: Items[int],
        faults: Items[bool],
        logprobs: StepLogprobs = NO_STEP_LOGPROBS,
    ) -> list[TokenEvent]:
        """Takes the step's result in; at most one event per sequence.

        Args:
            batch: the step, of the oldest uncommitted `next_batch`.
            token_ids: of `batch.sampled`. Of a verification those behind a wrong draft are void.
            faults: for each of them, whether its logits were not finite; then the token is void.
            logprobs: of those that want any.
        """
        prompts = {batch.chunks[number].sequence: table for number, table in logprobs.prompts.items()}
        events = []
        rows_end = 0
        for chunk in batch.chunks:
            if chunk.output_index is None:
                continue
            rows = range(rows_end, rows_end + max(1, len(chunk.verified)))
            rows_end = rows.stop
            table = prompts.pop(chunk.sequence, None)
            if chunk.sequence.status is SequenceStatus.FINISHED:
                continue
            event = self._commit_chunk(chunk, token_ids[rows.start : rows.stop], faults[rows.start : rows.stop])
            if event.error is None and (table is not None or rows.start in logprobs.sampled):
                tables = [logprobs.sampled[row] for row in rows[: len(event.token_ids)] if row in logprobs.sampled]
                event = replace(event, logprobs=LogprobTable.joined(tables), prompt_logprobs=table)
            events.append(event)
        return events + [
            TokenEvent(sequence.request_id, prompt_logprobs=table)
            for sequence, table in prompts.items()
            if sequence.status is not SequenceStatus.FINISHED
        ]

    def observe(self, batch: Batch, seconds: float) -> None:
        """Learns what a step took."""
        num_prompt_tokens = batch.num_prefill_tokens
        if self._speculation is not None and num_prompt_tokens == 0:
            self._speculation.observe(sum(chunk.length for chunk in batch.chunks), seconds)
        if self._step_times is not None:
            self._step_times.observe(batch.num_decode + batch.num_verified, num_prompt_tokens, seconds)

    def take_begun(self) -> list[str]:
        """Requests that have got their first slot since the last call."""
        if not self._begun:
            return self._begun
        begun, self._begun = self._begun, []
        return begun

    def take_ended(self) -> list[Sequence]:
        """The sequences that gave their slot back since the last call, for the clean-up of the device."""
        ended, self._ended = self._ended, []
        return ended

    def _decode(self) -> tuple[list[Chunk], list[Chunk]]:
        """Schedules every sequence that decodes: one token each, or with drafts where those are worth their rows."""
        ready = [sequence for sequence in self._running.values() if sequence.wants_decode]
        # Whoever runs, or might from this step on, gets a token.
        num_spare = self._max_step_tokens - min(len(self._running) + len(self._waiting), self._num_slots)
        num_rows = len(ready)
        decoding, verifying = [], []
        for sequence in ready:
            drafts: tuple[int, ...] = ()
            if self._speculation is not None:
                drafts = self._speculation.draft(sequence, num_rows=num_rows, most=num_spare)
            if drafts:
                verifying.append(sequence.next_verification(drafts))
                num_spare -= len(drafts)
                num_rows += len(drafts)
            else:
                decoding.append(sequence.next_chunk(1))
        return decoding, verifying

    def _read(self, moves: Moves, decoding: list[Chunk], verifying: list[Chunk]) -> list[Chunk]:
        """Schedules prompts, each with its share of what the step has left."""
        num_known = len(decoding) + len(verifying)
        if num_known == len(self._running):
            return []
        reading = [one for one in self._running.values() if one.status is SequenceStatus.PREFILL]
        if not reading:
            return []
        num_rows = sum(chunk.length for chunk in (*decoding, *verifying))
        budget = StepBudget(self._max_step_tokens - num_rows, self._max_scored_tokens)
        chunks: list[Chunk] = []
        for follower in moves.followers:  # in this very step, while its leader is where it is
            chunks += budget.feed(follower, 1)
        reading = [one for one in reading if one not in moves.followers]
        if reading:
            num_tokens = min(budget.num_tokens, self._prompt_tokens(num_known, num_rows))
            budget.num_tokens = num_tokens if self._step_times is None else until_first_token(reading, num_tokens)
        for sequence, most in self._prompts.split(reading, budget.num_tokens):
            chunks += budget.feed(sequence, most)
        return chunks

    def _prompt_tokens(self, num_decoding: int, num_rows: int) -> int:
        """Most prompt tokens of a step in which so many sequences decode, in so many rows."""
        left = self._max_step_tokens - num_rows
        limit = None if self._step_times is None else self._step_times.prompt_tokens(num_decoding)
        return left if limit is None else min(left, limit)

    def _commit_chunk(self, chunk: Chunk, token_ids: Items[int], faults: Items[bool]) -> TokenEvent:
        """Commits what a chunk sampled, one token or those of a verification that stand."""
        sequence = chunk.sequence
        if not chunk.verified:
            return self._commit_row(sequence, token_ids[0], is_faulty=faults[0])
        count = num_confirmed(chunk.drafts, token_ids, faults)
        sequence.confirm(chunk, count)
        self.num_drafted += len(chunk.drafts)
        self.num_accepted += count - 1
        committed: tuple[int, ...] = ()
        for number in range(count):
            event = self._commit_row(sequence, token_ids[number], is_faulty=faults[number])
            committed += event.token_ids
            if event.finish_reason is not None:
                break
        if event.error is not None:
            return event
        num_accepted = min(count - 1, len(committed)) if chunk.is_predicted else 0
        num_rejected = len(chunk.drafts) - num_accepted if chunk.is_predicted else 0
        return replace(event, token_ids=committed, num_accepted=num_accepted, num_rejected=num_rejected)

    def _commit_row(self, sequence: Sequence, token_id: int, *, is_faulty: bool) -> TokenEvent:
        if is_faulty:
            self._end(sequence)
            message = "the model's output for this request was not finite"
            return _failed(sequence.request_id, code=NUMERICAL_ERROR, message=message)
        if sequence.sampling.max_tokens == 0:
            self._end(sequence)
            return TokenEvent(
                sequence.request_id, finish_reason=FinishReason.LENGTH, num_cached_tokens=sequence.num_cached
            )
        problem = None if sequence.constraint is None else sequence.constraint.accept(token_id)
        if problem is not None:
            self._end(sequence)
            message = f"the answer could not be kept within the grammar of the request: {problem}"
            return _failed(sequence.request_id, code="grammar_failed", message=message)
        reason = sequence.accept(token_id)
        if reason is not None:
            self._end(sequence)
        num_cached = sequence.num_cached if sequence.is_first_output else 0
        return TokenEvent(sequence.request_id, (token_id,), reason, num_cached_tokens=num_cached)

    def _begin(self, sequence: Sequence) -> None:
        """Prepares a sequence that gets its first slot."""
        sequence.max_unseen = self._max_unseen
        self._begun.append(sequence.request_id)
        self._on_admission(sequence)
        if self._speculation is not None:
            self._speculation.begin(sequence)

    def _end(self, sequence: Sequence) -> None:
        has_begun = sequence.status is not SequenceStatus.WAITING or sequence.is_preempted
        self._admission.remove(sequence)
        sequence.finish()
        if has_begun:
            self._ended.append(sequence)


def _failed(request_id: str, *, code: str, message: str) -> TokenEvent:
    return TokenEvent(request_id, finish_reason=FinishReason.ERROR, error=EngineError(code, message))
