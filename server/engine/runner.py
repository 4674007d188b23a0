"""Runs steps on the device: the only caller of the model and of the sampler.

A step costs one copy to the device (`Transfer`) and one back (the sampled tokens, and log-probabilities where
requests ask for them). The last token of
every slot stays on the device, so `launch` may be called for the next step before `collect` for this
one; everything goes into one stream, in order, clearing of slots included.
"""

from array import array
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from dijiang_model.model import PackedBatch
from dijiang_model.state import StateBuffer
from server.engine.engine import StepResult
from server.engine.logprob_types import NO_STEP_LOGPROBS
from server.engine.logprobs import LogprobPlan, scored_rows
from server.engine.sampler import FAULTY, Sampler, SamplingPlan
from server.engine.scheduler import Batch
from server.engine.sequence import Chunk, Sequence
from server.engine.speculation_drafts import num_confirmed
from server.engine.state_pool import StatePool
from server.engine.transfer import Arrived, Field, Transfer

Model = Callable[[PackedBatch, StateBuffer], Tensor]
"""Logits [R, vocab] of a step; moves the slots on in place, but for held ones (`PackedBatch.num_held`)."""
Advance = Callable[[Items[int], StateBuffer], None]
"""Moves the slots that the last step has held on, each by so many of its tokens."""


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A launched step: tokens on their way to the host, and the event that says they are there."""

    batch: Batch
    num_sampled: int
    logprobs: LogprobPlan | None
    numbers: Tensor  # int32 on the host: num_sampled tokens, then what the plan computed
    arrived: torch.cuda.Event | None


class ModelRunner:
    """A model, its states and its sampler on one device."""

    def __init__(
        self, model: Model, *, pool: StatePool, sampler: Sampler, device: torch.device, advance: Advance | None = None
    ) -> None:
        """`advance`: of a model that can hold slots; None: no drafts are verified."""
        self._model = model
        self._advance = advance
        self._pool = pool
        self._sampler = sampler
        self._device = device
        # Filled with 0, not left as it is: a token id read from the scratch slot must be a valid one.
        self._last_token_ids = torch.zeros(pool.num_slots + 1, dtype=torch.int64, device=device)
        self._in_flight: deque[_InFlight] = deque()

    @torch.inference_mode()
    def launch(self, batch: Batch) -> None:
        """Starts a step; on a CPU it is done on return."""
        for chunk in batch.chunks:
            if chunk.is_first:
                self._begin(chunk)
        transfer = Transfer()
        fields = _StepFields.prepare(batch, transfer)
        plan = self._sampler.prepare(batch.sampled, transfer)
        scoring = LogprobPlan.prepare(batch, transfer)
        arrived = transfer.send(self._device)
        logits = self._model(self._packed(batch, fields, arrived), self._pool.buffer)
        num_sampled = len(batch.sampled)
        kept = None if scoring is None else scoring.keep(logits, arrived)
        token_ids = self._sample(logits[:num_sampled], plan, fields, arrived)
        if batch.num_verified > 0:
            self._confirm(batch, token_ids)
        numbers = token_ids.int()
        if scoring is not None and kept is not None:
            computed = scoring.compute(kept, logits[num_sampled:], token_ids, arrived)
            numbers = torch.cat((numbers, computed.flatten()))
        on_host, event = self._send_back(numbers)
        self._in_flight.append(_InFlight(batch, num_sampled, scoring, on_host, event))

    def collect(self) -> StepResult:
        """Waits for the oldest launched step and takes its tokens.

        Raises:
            IndexError: no step is in flight.
        """
        step = self._in_flight.popleft()
        if step.arrived is not None:
            step.arrived.synchronize()
        token_ids = step.numbers[: step.num_sampled].tolist()
        logprobs = NO_STEP_LOGPROBS
        if step.logprobs is not None:
            logprobs = step.logprobs.tables(step.numbers[step.num_sampled :], step.batch)
        return StepResult(token_ids, [token_id == FAULTY for token_id in token_ids], logprobs)

    @torch.inference_mode()
    def release(self, sequence: Sequence) -> None:
        """Clears the slot and the sampler's memory of an ended sequence."""
        assert sequence.slot is not None
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

    def _sample(self, logits: Tensor, plan: SamplingPlan, fields: "_StepFields", arrived: Arrived) -> Tensor:
        """[S, vocab] -> [S] int64 tokens, which are the last ones of their slots from now on."""
        if len(logits) == 0:
            return torch.empty(0, dtype=torch.int64, device=self._device)
        token_ids = self._sampler.sample(logits, plan, arrived)
        self._last_token_ids[arrived[fields.sampled_slots]] = token_ids.clamp(min=0)
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

    def _packed(self, batch: Batch, fields: "_StepFields", arrived: Arrived) -> PackedBatch:
        slots = arrived[fields.slots]
        last = self._last_token_ids[slots[: batch.num_decode]]
        return PackedBatch(
            token_ids=torch.cat((last, arrived[fields.token_ids])),
            positions=arrived[fields.positions],
            slots=slots,
            lengths=tuple(chunk.length for chunk in batch.chunks),
            num_decode=batch.num_decode,
            num_held=batch.num_verified,
            logit_rows=arrived[fields.logit_rows],
        )

    def _send_back(self, numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if self._device.type != "cuda" or len(numbers) == 0:
            return numbers.cpu(), None
        on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        on_host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return on_host, event


@dataclass(frozen=True, slots=True)
class _StepFields:
    """The model's part of a transfer; see `PackedBatch`."""

    slots: Field
    token_ids: Field
    positions: Field
    logit_rows: Field
    sampled_slots: Field

    @classmethod
    def prepare(cls, batch: Batch, transfer: Transfer) -> "_StepFields":
        token_ids, positions, logit_rows = array("q"), array("q"), array("q")
        for chunk in batch.chunks:
            token_ids.extend(chunk.token_ids)
            positions.extend(range(chunk.position, chunk.position + chunk.length))
            if chunk.output_index is not None:
                logit_rows.extend(range(len(positions) - max(1, len(chunk.verified)), len(positions)))
        logit_rows.extend(scored_rows(batch.chunks))  # behind the sampled ones
        return cls(
            slots=transfer.integers(_slots(batch.chunks)),
            token_ids=transfer.integers(token_ids),
            positions=transfer.integers(positions),
            logit_rows=transfer.integers(logit_rows),
            sampled_slots=transfer.integers(_slots(batch.sampled)),
        )


def _slots(chunks: Items[Chunk]) -> list[int]:
    return [chunk.slot for chunk in chunks]
