"""Runs steps on the device: the only caller of the model and of the sampler.

A step costs one copy to the device (`Transfer`) and one back (the sampled tokens, and log-probabilities where
requests ask for them). The last token of every slot stays on the device, so `launch` may be called for the next step
before `collect` for this one; everything goes into one stream, in order, clearing of slots included.

What some row may sample can depend on tokens that were not read back yet (a grammar). Such a step is launched as far
as its logits; `complete` samples them, with a second copy, once the step before it was committed. So a grammar costs
no step, and the device computes while the host works out what is permitted.
"""

from array import array
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dijiang_model.batch import PackedBatch
from dijiang_model.state import StateBuffer
from server.engine.batch import Batch, StepResult
from server.engine.fast_steps import graph_sampling
from server.engine.fast_steps.decode_rows import Decode, DecodeRows, DecodeStep
from server.engine.fast_steps.graphs import DecodeGraphs
from server.engine.sampling.logprobs import LogprobPlan, scored_rows
from server.engine.sampling.sampler import FAULTY, Sampler, SamplingPlan
from server.engine.sequence import Chunk, Sequence, SequenceStatus
from server.engine.slots import SCRATCH_SLOT
from server.engine.speculation.drafts import num_confirmed
from server.engine.state.pool import StatePool
from server.engine.transfer import Field, Transfer, TransferredFields
from server.engine.types.logprobs import NO_STEP_LOGPROBS
from server.engine.types.requests import GenerationRequest, SamplingParams

Model = Callable[[PackedBatch, StateBuffer], Tensor]
"""Logits [R, vocab] of a step; moves the slots on in place, but for held ones (`PackedBatch.num_uncommitted`)."""
Advance = Callable[[Items[int], StateBuffer], None]
"""Moves the slots that the last step has held on, each by so many of its tokens."""


_NOBODY = Sequence(GenerationRequest("", (0,), SamplingParams(temperature=0.0)), ())
"""Stands for a sequence that ended while its step was under way."""


@dataclass(frozen=True, slots=True)
class _Open:
    """A step whose logits are on their way, and which was not sampled yet; `slots`: [S] of the sampled rows."""

    batch: Batch
    scoring: LogprobPlan | None
    arrived: TransferredFields
    logits: Tensor
    slots: Tensor


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A launched step: tokens on their way to the host, and the event that says they are there."""

    batch: Batch
    num_sampled: int
    logprobs: LogprobPlan | None
    numbers: Tensor | list[int]  # on the host: num_sampled tokens, then (in tensors) what the plan computed
    arrived: torch.cuda.Event | None


class ModelRunner:
    """A model, its states and its sampler on one device."""

    def __init__(
        self,
        model: Model,
        *,
        pool: StatePool,
        sampler: Sampler,
        device: torch.device,
        advance: Advance | None = None,
        decode: Decode | None = None,
        record: Callable[[Tensor], DecodeGraphs] | None = None,
    ) -> None:
        """
        Args:
            advance: of a model that can hold slots; None: no drafts are verified.
            decode: prepares steps of a model on the CPU in which every sequence decodes; None: every step is made anew.
            record: makes captured decode steps around the slots' last tokens [P]; None: every step runs freshly.
        """
        self._model = model
        self._advance = advance
        self._pool = pool
        self._sampler = sampler
        self._device = device
        # Filled with 0, not left as it is: a token id read from the scratch slot must be a valid one.
        self._last_token_ids = torch.zeros(pool.num_slots + 1, dtype=torch.int64, device=device)
        self._graphs = None if record is None else record(self._last_token_ids)
        self._decode_rows = None
        if decode is not None:
            self._decode_rows = DecodeRows(decode, self._last_token_ids, pool.buffer, vocab_size=sampler.vocab_size)
        self._in_flight: deque[_InFlight] = deque()
        self._open: _Open | None = None

    def launch(self, batch: Batch) -> None:
        """Starts a step; on a CPU it is done on return, unless it waits for `complete`."""
        self.complete()
        if batch.preempted or batch.resumed:
            self._change_hands(batch)
        kept = None if self._decode_rows is None else self._decode_rows.of(batch)
        if kept is not None and kept.rules is not None:
            self._in_flight.append(_InFlight(batch, len(batch.sampled), None, kept.tokens(batch), None))
        else:
            self._launch(batch, kept)

    @torch.inference_mode()
    def _change_hands(self, batch: Batch) -> None:
        """Copies the states of sequences that lose their slot, and puts back those of others that have one again."""
        for sequence, slot in batch.preempted:
            if sequence.has_state:
                sequence.parked = self._pool.snapshot(slot)
        for sequence in batch.resumed:
            if isinstance(sequence.parked, Tensor):
                self._pool.restore(sequence.slot, sequence.parked)
                sequence.parked = None
            self._last_token_ids[sequence.slot] = sequence.last_token_id

    @torch.inference_mode()
    def _launch(self, batch: Batch, kept: DecodeStep | None) -> None:
        for chunk in batch.chunks[batch.num_decode :]:
            if chunk.is_first:
                self._begin(chunk)
        bucket = self._bucket(batch)
        transfer = Transfer()
        fields = _StepFields.prepare(batch, transfer, bucket=bucket) if kept is None else None
        if bucket is not None and self._launch_captured(batch, bucket, transfer):
            return
        scoring = LogprobPlan.prepare(batch, transfer)
        plan = None if _depends_on_tokens_in_flight(batch) else self._sampler.prepare(batch.sampled, transfer)
        arrived = transfer.send(self._device)
        if kept is not None:
            step = _Open(batch, scoring, arrived, kept.decoding.step(), kept.slots)
        else:
            assert fields is not None
            logits = self._logits(batch, bucket, fields, arrived)
            step = _Open(batch, scoring, arrived, logits, fields.sampled(batch, arrived))
        if plan is None:
            self._open = step
        else:
            self._finish(step, plan, arrived)

    def complete(self) -> None:
        """Samples a step that waited for the one before it to be committed; nothing happens if none did."""
        if self._open is not None:
            self._complete(self._open)

    @torch.inference_mode()
    def _complete(self, step: _Open) -> None:
        self._open = None
        transfer = Transfer()
        plan = self._sampler.prepare([_unless_ended(chunk) for chunk in step.batch.sampled], transfer)
        self._finish(step, plan, transfer.send(self._device))

    def collect(self) -> StepResult:
        """Waits for the oldest launched step and takes its tokens.

        Raises:
            IndexError: no step is in flight.
        """
        step = self._in_flight.popleft()
        if step.arrived is not None:
            step.arrived.synchronize()
        numbers, logprobs = step.numbers, NO_STEP_LOGPROBS
        token_ids = numbers if isinstance(numbers, list) else numbers[: step.num_sampled].tolist()
        if step.logprobs is not None:
            assert isinstance(numbers, Tensor)
            logprobs = step.logprobs.tables(numbers[step.num_sampled :], step.batch)
        return StepResult(token_ids, [token_id == FAULTY for token_id in token_ids], logprobs)

    @torch.inference_mode()
    def release(self, sequence: Sequence) -> None:
        """Clears the slot and the sampler's memory of an ended sequence."""
        if sequence.slot != SCRATCH_SLOT:
            self._pool.reset(sequence.slot)
        self._sampler.release(sequence)

    def _begin(self, chunk: Chunk) -> None:
        """The state before the first token."""
        snapshot, source_slot = chunk.sequence.start.snapshot, chunk.sequence.start.source_slot
        if source_slot is not None:
            self._pool.copy(source_slot, target=chunk.slot)
        elif snapshot is None:
            self._pool.reset(chunk.slot)
        else:
            assert isinstance(snapshot, Tensor)
            self._pool.restore(chunk.slot, snapshot)

    def _bucket(self, batch: Batch) -> int | None:
        """The captured step for a batch; None if there is none."""
        if self._graphs is None or batch.num_decode < len(batch.chunks):
            return None
        return self._graphs.bucket_for(batch.num_decode)

    def _launch_captured(self, batch: Batch, bucket: int, transfer: Transfer) -> bool:
        """Replays model and sampling; False, with nothing done, if the rows want other sampling than was captured."""
        kind = graph_sampling.kind_of(batch.sampled, self._sampler.vocab_size)
        wants_logprobs = any(chunk.sequence.request.logprobs.num_output is not None for chunk in batch.sampled)
        if self._graphs is None or kind is None or wants_logprobs or not self._graphs.samples(kind):
            return False
        graph_sampling.prepare(batch.sampled, bucket, self._sampler.vocab_size, transfer)
        self._graphs.feed(bucket, transfer.send(self._device).words)
        self._graphs.forward(bucket)
        tokens = self._graphs.sample(bucket, kind)
        self._to_host(batch, None, tokens[: len(batch.sampled)])
        return True

    def _logits(self, batch: Batch, bucket: int | None, fields: "_StepFields", arrived: TransferredFields) -> Tensor:
        """[R, vocab]; of a captured step those of its `R` first rows."""
        if self._graphs is None or bucket is None:
            return self._model(self._packed(batch, fields, arrived), self._pool.buffer)
        self._graphs.feed(bucket, arrived.words[: 2 * bucket])
        return self._graphs.forward(bucket)[: batch.num_decode]

    def _finish(self, step: _Open, plan: SamplingPlan, planned: TransferredFields) -> None:
        """Samples and sends back; the plan was prepared into `planned`."""
        num_sampled, scoring = len(step.batch.sampled), step.scoring
        kept = None if scoring is None else scoring.keep(step.logits, step.arrived)
        token_ids = self._sample(step.logits[:num_sampled], plan, planned, step.slots)
        if step.batch.num_verified > 0:
            self._confirm(step.batch, token_ids)
        numbers = token_ids
        if scoring is not None and kept is not None:
            computed = scoring.compute(kept, step.logits[num_sampled:], token_ids, step.arrived)
            numbers = torch.cat((token_ids.int(), computed.flatten()))
        self._to_host(step.batch, scoring, numbers)

    def _sample(self, logits: Tensor, plan: SamplingPlan, arrived: TransferredFields, slots: Tensor) -> Tensor:
        """[S, vocab] -> [S] int64 tokens, which are the last ones of their slots from now on."""
        if len(logits) == 0:
            return torch.empty(0, dtype=torch.int64, device=self._device)
        token_ids = self._sampler.sample(logits, plan, arrived)
        self._last_token_ids.index_copy_(0, slots, token_ids.clamp(min=0))
        return token_ids

    def _confirm(self, batch: Batch, token_ids: Tensor) -> None:
        """Moves verified slots on by what turned out to be right; only where the device is the host."""
        assert self._advance is not None
        sampled, begin, counts = token_ids.tolist(), batch.num_decode, []
        for chunk in batch.chunks[batch.num_decode : batch.num_decode + batch.num_verified]:
            rows = sampled[begin : begin + chunk.length]
            begin += chunk.length
            counts.append(num_confirmed(chunk.drafts, rows, [token_id == FAULTY for token_id in rows]))
            self._last_token_ids[chunk.slot] = max(rows[counts[-1] - 1], 0)
        self._advance(counts, self._pool.buffer)

    def _packed(self, batch: Batch, fields: "_StepFields", arrived: TransferredFields) -> PackedBatch:
        slots = arrived[fields.slots]
        last = self._last_token_ids[slots[: batch.num_decode]]
        return PackedBatch(
            token_ids=torch.cat((last, arrived[fields.token_ids])),
            positions=arrived[fields.positions],
            slots=slots,
            lengths=tuple(chunk.length for chunk in batch.chunks),
            num_decode=batch.num_decode,
            num_uncommitted=batch.num_verified,
            logit_rows=arrived[fields.logit_rows],
        )

    def _to_host(self, batch: Batch, scoring: LogprobPlan | None, numbers: Tensor) -> None:
        """Sends integers back, not waited for; the step is in flight."""
        num_sampled = len(batch.sampled)
        if self._device.type != "cuda" or len(numbers) == 0:
            # A captured step writes into the same memory again.
            on_host = numbers.to("cpu", copy=self._graphs is not None)
            self._in_flight.append(_InFlight(batch, num_sampled, scoring, on_host, None))
            return
        on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        on_host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._in_flight.append(_InFlight(batch, num_sampled, scoring, on_host, event))


@dataclass(frozen=True, slots=True)
class _StepFields:
    """The model's part of a transfer; see `PackedBatch`. That of a captured step begins with slots and positions."""

    slots: Field
    token_ids: Field
    positions: Field
    logit_rows: Field
    sampled_slots: Field
    is_captured: bool

    def sampled(self, batch: Batch, arrived: TransferredFields) -> Tensor:
        """[S] slots of the sampled rows."""
        return arrived[self.slots][: batch.num_decode] if self.is_captured else arrived[self.sampled_slots]

    @classmethod
    def prepare(cls, batch: Batch, transfer: Transfer, *, bucket: int | None = None) -> "_StepFields":
        """Lists what the step feeds; `bucket` fills slots and positions up to so many rows."""
        token_ids, positions, logit_rows = array("q"), array("q"), array("q")
        for chunk in batch.chunks:
            token_ids.extend(chunk.token_ids)
            positions.extend(range(chunk.position, chunk.position + chunk.length))
            if chunk.output_index is not None:
                logit_rows.extend(range(len(positions) - max(1, len(chunk.verified)), len(positions)))
        logit_rows.extend(scored_rows(batch.chunks))  # behind the sampled ones
        slots = _slots(batch.chunks)
        if bucket is not None:
            num_padding = bucket - len(slots)
            slots += [SCRATCH_SLOT] * num_padding
            positions.extend([0] * num_padding)
        return cls(
            slots=transfer.integers(slots),
            positions=transfer.integers(positions),
            token_ids=transfer.integers(token_ids),
            logit_rows=transfer.integers(logit_rows if bucket is None else ()),
            sampled_slots=transfer.integers(_slots(batch.sampled) if bucket is None else ()),
            is_captured=bucket is not None,
        )


def _slots(chunks: Items[Chunk]) -> list[int]:
    return [chunk.slot for chunk in chunks]


def _depends_on_tokens_in_flight(batch: Batch) -> bool:
    """Whether the host must see earlier steps' tokens before it can say what this one may sample."""
    return any(
        chunk.sequence.depends_on_last_token and chunk.output_index > chunk.sequence.num_outputs
        for chunk in batch.sampled
        if chunk.output_index is not None and not chunk.verified
    )


def _unless_ended(chunk: Chunk) -> Chunk:
    ended = chunk.sequence.status is SequenceStatus.FINISHED
    return replace(chunk, sequence=_NOBODY, output_index=0) if ended else chunk
