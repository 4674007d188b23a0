"""The progress of one request: WAITING -> PREFILL -> DECODE -> FINISHED.

Progress is counted when tokens are *scheduled*, and again when sampled tokens are *committed*, so that
a step can be planned before the one before it was read back. No token but the prompt's is kept here, or
the last ones for those who need them: a sequence takes the same memory at output 1 and at output 1,000,000.
"""

from array import array
from dataclasses import dataclass, field, replace
from enum import Enum

from server.engine.followers import Constraint, Drafter
from server.engine.slots import SCRATCH_SLOT
from server.engine.types.requests import FinishReason, GenerationRequest, SamplingParams, Tenant

MAX_OUTPUTS_KEPT = 1 << 16


class SequenceStatus(Enum):
    """What a sequence does next."""

    WAITING = "waiting"
    """It has no slot yet."""
    PREFILL = "prefill"
    """Prompt tokens are left to feed."""
    DECODE = "decode"
    """The whole prompt is scheduled; each step feeds the last sampled token."""
    FINISHED = "finished"
    """Its terminal event was made."""


@dataclass(frozen=True, slots=True)
class StartState:
    """Where a sequence begins.

    Attributes:
        position: of its first token in the conversation.
        snapshot: the state before that token, opaque; None: the empty one.
        source_slot: where that state lies instead when the sequence's first step is launched; None: nowhere.
        num_outputs: tokens of the same answer that came before it.
    """

    position: int = 0
    snapshot: object | None = None
    source_slot: int | None = None
    num_outputs: int = 0


FROM_NOTHING = StartState()


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in the engine.

    Attributes:
        request: what the client wants.
        eos_token_ids: the model's end-of-sequence tokens.
        start: the state that it begins from.
        arrival: its place among all requests, in the order in which they came.
        status: what comes next.
        slot: place of its state, from admission on; kept after the end for the clean-up. Before: none of its own.
        num_fed: tokens scheduled into the model or skipped, hence the place of the next one.
        num_skipped: tokens of the prompt that it did not feed itself.
        num_cached: those of them whose state was cached, rather than copied from a sequence of its group.
        stops: lengths of the prompt at which a chunk must end.
        num_scheduled: output tokens that steps were asked for.
        num_outputs: output tokens committed, <= num_scheduled.
        num_outputs_before: those of them that are from before it was suspended.
        constraint: from admission on, if the request has a grammar. What may come next then depends on the host
            having seen the last token.
        max_unseen: steps that may be planned for such a sequence before their tokens were seen.
        drafter: guesses its next tokens; None: nobody does.
        last_token_id: the output token committed last.
        is_preempted: it waits for a slot again, its state in `parked` if it has fed anything.
        parked: what lay in its slot when another sequence got that.
        is_yielding: no more of it is scheduled, so that its slot can be taken when its last token was seen.
        num_admitted: steps planned before it got its slot.
        is_verifying: a step that verifies drafts is in flight; what comes after it is not known before.
        end_token_ids: tokens that end it.
    """

    request: GenerationRequest
    eos_token_ids: tuple[int, ...]
    start: StartState = FROM_NOTHING
    arrival: int = 0
    status: SequenceStatus = SequenceStatus.WAITING
    slot: int = SCRATCH_SLOT
    num_fed: int = 0
    num_skipped: int = 0
    num_cached: int = 0
    stops: frozenset[int] = frozenset()
    num_scheduled: int = 0
    num_outputs: int = 0
    num_outputs_before: int = 0
    constraint: Constraint | None = None
    max_unseen: int = 0
    drafter: Drafter | None = None
    last_token_id: int = 0
    is_preempted: bool = False
    parked: object | None = None
    is_yielding: bool = False
    num_admitted: int = 0
    is_verifying: bool = False
    end_token_ids: frozenset[int] = field(init=False)
    _outputs: "array[int] | None" = None

    def __post_init__(self) -> None:
        if self.request.states.save_to is not None or self.sampling.bad_words:
            self.keep_outputs()
        self._begin_behind_outputs()
        self.stops = frozenset(self.request.cuts)
        eos = () if self.sampling.ignore_eos else self.eos_token_ids
        self.end_token_ids = frozenset((*eos, *self.sampling.stop_token_ids))

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def tenant(self) -> Tenant:
        return self.request.tenant

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are wanted, so that all of it must be fed."""
        return self.request.logprobs.num_prompt is not None

    @property
    def num_prompt_left(self) -> int:
        """Prompt tokens that no step has taken yet."""
        return max(0, len(self.request.prompt_token_ids) - self.num_fed)

    @property
    def num_chunk_left(self) -> int:
        """Those up to the next stop: the most that its next chunk may have."""
        ahead = [stop for stop in self.stops if stop > self.num_fed]
        return min(self.num_prompt_left, min(ahead, default=self.num_prompt_left + self.num_fed) - self.num_fed)

    @property
    def depends_on_last_token(self) -> bool:
        """Whether the host must have seen the last token before it can say what may come next."""
        return self.constraint is not None or any(len(word) > 1 for word in self.sampling.bad_words)

    @property
    def wants_decode(self) -> bool:
        """Whether another output token may be scheduled; false once `max_tokens` are on their way."""
        limit = self.sampling.max_tokens
        num_unseen = self.num_scheduled - self.num_outputs
        if self.is_yielding or self.is_verifying or (self.depends_on_last_token and num_unseen > self.max_unseen):
            return False
        return self.status is SequenceStatus.DECODE and (limit is None or self.num_scheduled < limit)

    @property
    def max_drafts(self) -> int | None:
        """How many drafts its next step may verify; None: any number."""
        if self.drafter is None or self.num_scheduled > self.num_outputs:
            return 0  # the last token, which drafts follow, is not there yet
        limit = self.sampling.max_tokens
        return None if limit is None else limit - self.num_outputs - 1

    @property
    def outputs(self) -> "array[int]":
        """The tokens committed last, at least `MAX_OUTPUTS_KEPT` / 2; `keep_outputs` was called before the first."""
        assert self._outputs is not None
        return self._outputs

    @property
    def pending(self) -> tuple[int, ...]:
        """Committed tokens that were not fed."""
        num_new = self.num_outputs - self.num_outputs_before
        num_pending = len(self.request.prompt_token_ids) + num_new - self.num_fed
        return tuple(self.outputs[-num_pending:]) if num_pending > 0 else ()

    @property
    def has_all_outputs(self) -> bool:
        """Whether `outputs` still holds all of them."""
        return len(self.outputs) == self.num_outputs

    @property
    def is_past_prompt(self) -> bool:
        """Whether it has put out tokens here or before."""
        return self.num_outputs > 0

    @property
    def is_first_output(self) -> bool:
        """Whether the last committed token was the first one here."""
        return self.num_outputs == self.num_outputs_before + 1

    def keep_outputs(self) -> None:
        """Keeps the output tokens from now on, for those who need to know what the state has seen."""
        if self._outputs is None:
            self._outputs = array("i")

    def save_on_end(self, save_to: str | None, note: str) -> None:
        """Changes its mind about where its state is saved."""
        states = replace(self.request.states, save_to=save_to, note=note, prompt_only=False)
        self.request = replace(self.request, states=states)

    def skip(self, num_tokens: int, snapshot: object) -> None:
        """Begins behind that many tokens of the prompt, from the state after them."""
        assert self.num_fed == 0
        assert 0 < num_tokens < len(self.request.prompt_token_ids)
        self.num_fed = self.num_skipped = self.num_cached = num_tokens
        self.start = StartState(self.start.position, snapshot)

    def fork(self, leader: "Sequence") -> None:
        """Begins where the leader, a sequence of the same prompt, is now."""
        assert self.status is SequenceStatus.WAITING
        self.num_fed = self.num_skipped = leader.num_fed
        self.num_cached = 0
        self.start = StartState(self.start.position, source_slot=leader.slot)

    def admit(self, slot: int) -> None:
        """WAITING -> PREFILL, or DECODE again, in a slot of its own."""
        assert self.status is SequenceStatus.WAITING
        self.slot = slot
        decodes = self.is_preempted and self.num_prompt_left == 0
        self.status = SequenceStatus.DECODE if decodes else SequenceStatus.PREFILL
        self.is_preempted = False

    @property
    def is_settled(self) -> bool:
        """Whether every token that was asked for was seen, so that it can stop here and go on elsewhere."""
        return self.num_scheduled == self.num_outputs

    @property
    def has_state(self) -> bool:
        """Whether it has fed anything, so that there is a state that it does not begin from."""
        return self.num_fed > self.num_skipped

    @property
    def is_parked(self) -> bool:
        """Whether it waits for a slot again, and its state is kept elsewhere."""
        return self.is_preempted and self.has_state

    def preempt(self) -> int:
        """PREFILL or DECODE -> WAITING; returns the slot that is another's from the next step on."""
        assert self.is_settled
        slot, self.slot = self.slot, SCRATCH_SLOT
        self.status, self.is_preempted, self.is_yielding = SequenceStatus.WAITING, True, False
        return slot

    def next_chunk(self, max_tokens: int) -> "Chunk":
        """Schedules its next tokens: up to `max_tokens` (>= 1) of the prompt, or one decoded token."""
        is_decode = self.status is SequenceStatus.DECODE
        length = 1 if is_decode else min(self.num_chunk_left, max_tokens)
        assert length > 0
        start = self.num_fed
        self.num_fed += length
        output_index = None
        if self.num_prompt_left == 0:
            self.status = SequenceStatus.DECODE
            output_index = self.num_scheduled
            self.num_scheduled += 1
        return Chunk(
            sequence=self, slot=self.slot, start=start, length=length, output_index=output_index, is_decode=is_decode
        )

    def next_verification(self, drafts: tuple[int, ...]) -> "Chunk":
        """Schedules its last token and drafts of the next ones, up to `max_drafts`; `confirm` says how it went."""
        assert self.status is SequenceStatus.DECODE
        assert self.drafter is not None
        verified = (self.drafter.last_token_id, *drafts)
        chunk = Chunk(
            sequence=self,
            slot=self.slot,
            start=self.num_fed,
            length=len(verified),
            output_index=self.num_scheduled,
            is_decode=False,
            verified=verified,
            is_predicted=self.drafter.follows_prediction,
        )
        self.num_fed += chunk.length
        self.num_scheduled += chunk.length
        self.is_verifying = True
        return chunk

    def confirm(self, chunk: "Chunk", num_tokens: int) -> None:
        """Of a verification only the first `num_tokens` were fed and scheduled; `accept` of as many tokens follows."""
        self.num_fed -= chunk.length - num_tokens
        self.num_scheduled -= chunk.length - num_tokens
        self.is_verifying = False

    def accept(self, token_id: int) -> FinishReason | None:
        """Commits one sampled token; says whether, and why, the sequence ends with it."""
        self.num_outputs += 1
        self.last_token_id = token_id
        if self.drafter is not None:
            self.drafter.push(token_id)
        if self._outputs is not None:
            if len(self._outputs) == MAX_OUTPUTS_KEPT:
                del self._outputs[: MAX_OUTPUTS_KEPT // 2]
            self._outputs.append(token_id)
        if token_id in self.end_token_ids and self.num_outputs > self.sampling.min_tokens:
            return FinishReason.STOP
        if self.constraint is not None and self.constraint.has_ended:
            return FinishReason.STOP  # nothing else could come, whatever `min_tokens` and `ignore_eos` ask for
        if self.num_outputs == self.sampling.max_tokens:
            return FinishReason.LENGTH
        return None

    def _begin_behind_outputs(self) -> None:
        """Lets it go on where it, or the answer that it goes on with, was suspended."""
        num_outputs = self.start.num_outputs
        if (resumed := self.request.resumed) is not None:
            num_outputs = resumed.num_outputs
            self.num_fed = self.num_skipped = resumed.num_fed
            before = self.request.prompt_token_ids[len(self.request.prompt_token_ids) - num_outputs :]
            self._outputs = array("i", before[-MAX_OUTPUTS_KEPT // 2 :])
        self.num_outputs = self.num_scheduled = self.num_outputs_before = num_outputs

    def finish(self) -> None:
        """Any state -> FINISHED, once."""
        assert self.status is not SequenceStatus.FINISHED
        self.status = SequenceStatus.FINISHED


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one sequence in one step.

    Attributes:
        sequence: whose tokens these are.
        slot: where its state lies.
        start: how many tokens of the sequence come before the first.
        length: tokens, >= 1.
        output_index: which output token the step samples from the last of them, from 0; None: none,
            more of the prompt follows.
        is_decode: the token is the last sampled one, which the device holds.
        verified: of a chunk that verifies drafts: its tokens, the last sampled one and the drafts. It samples behind
            each of them, and moves the state on by no more than turn out to be right. Empty otherwise.
        is_predicted: the drafts are from the request's prediction.
    """

    sequence: Sequence
    slot: int
    start: int
    length: int
    output_index: int | None
    is_decode: bool
    verified: tuple[int, ...] = ()
    is_predicted: bool = False

    @property
    def is_first(self) -> bool:
        """Whether these are the first tokens that the sequence feeds."""
        return self.start == self.sequence.num_skipped

    @property
    def position(self) -> int:
        """Position of the first token in the conversation."""
        return self.sequence.start.position + self.start

    @property
    def drafts(self) -> tuple[int, ...]:
        """Tokens that are taken for granted behind the last sampled one."""
        return self.verified[1:]

    @property
    def samples(self) -> "list[Chunk]":
        """For each token that is sampled, from first to last, a chunk that ends where it comes."""
        if self.output_index is None:
            return []
        if not self.verified:
            return [self]
        return [
            replace(self, length=length, output_index=self.output_index + length - 1, verified=self.verified[:length])
            for length in range(1, self.length + 1)
        ]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens to feed, which the host knows; empty when decoding."""
        if self.is_decode or self.verified:
            return self.verified
        return self.sequence.request.prompt_token_ids[self.start : self.start + self.length]

    @property
    def num_scored(self) -> int:
        """How many of the tokens have a follower in the prompt whose log-probability is wanted."""
        if self.is_decode or self.verified or not self.sequence.scores_prompt:
            return 0
        return min(self.length, len(self.sequence.request.prompt_token_ids) - 1 - self.start)

    @property
    def scored_token_ids(self) -> tuple[int, ...]:
        """Those followers."""
        return self.sequence.request.prompt_token_ids[self.start + 1 : self.start + 1 + self.num_scored]
