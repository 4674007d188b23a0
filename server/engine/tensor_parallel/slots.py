"""Slots and steps of a split network as rank 0 sees them: whole, with every change told to the other ranks first."""

from typing import cast

import torch
from torch import Tensor

from dijiang_model.batch import PackedBatch
from dijiang_model.state import StateBuffer, StateSpec
from dijiang_model.tensor_parallel.network import ShardedModel
from dijiang_model.tensor_parallel.states import StateParts
from server.engine.state.pool import StatePool
from server.engine.tensor_parallel.channel import CopySlot, ResetSlot, RestoreSlot, Step, TakeSlot
from server.engine.tensor_parallel.ranks import Ranks


class LeadingModel:
    """Runs a step on all ranks; to a `ModelRunner` it is one model."""

    def __init__(self, model: ShardedModel, ranks: Ranks) -> None:
        self._model = model
        self._ranks = ranks

    def __call__(self, batch: PackedBatch, state: StateBuffer) -> Tensor:
        """Logits [R, vocab]; see `ShardedModel`."""
        self._ranks.tell(Step(batch.lengths, batch.num_decode, len(batch.logit_rows)))
        # Decoded tokens are known to this rank's device alone, so the words go from device to device, not by the host.
        words = torch.cat((batch.token_ids, batch.positions, batch.slots, batch.logit_rows))
        self._model.group.broadcast_(words)
        return cast(Tensor, self._model(batch, state))


def shared_batch(step: Step, model: ShardedModel, device: torch.device) -> PackedBatch:
    """The same step on another rank, its words received."""
    num_tokens, num_sequences = sum(step.lengths), len(step.lengths)
    sizes = (num_tokens, num_tokens, num_sequences, step.num_logit_rows)
    words = torch.empty(sum(sizes), dtype=torch.int64, device=device)
    token_ids, positions, slots, logit_rows = model.group.broadcast_(words).split(sizes)
    return PackedBatch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        lengths=step.lengths,
        num_decode=step.num_decode,
        logit_rows=logit_rows,
    )


class LeadingPool(StatePool):
    """The slots of all ranks; this one's part of each is in `buffer`. Snapshots are whole, as of one process."""

    def __init__(
        self, parts: StateParts, num_slots: int, device: torch.device, *, model: ShardedModel, ranks: Ranks
    ) -> None:
        super().__init__(parts.parts[0], num_slots, device)
        self._parts = parts
        self._group = model.group
        self._ranks = ranks

    @property
    def spec(self) -> StateSpec:
        """Of all ranks together."""
        return self._parts.whole

    def reset(self, slot: int) -> None:
        self._ranks.tell(ResetSlot(slot))
        super().reset(slot)

    def copy(self, source: int, *, target: int) -> None:
        self._ranks.tell(CopySlot(source, target))
        super().copy(source, target=target)

    def take(self, slot: int) -> Tensor:
        """A whole copy of a slot on this rank's device, collected from all of them."""
        self._ranks.tell(TakeSlot(slot))
        collected = self._group.gather(self._row(slot))
        assert collected is not None
        return self._parts.join(collected)

    def snapshot(self, slot: int) -> Tensor:
        return self.take(slot).cpu()

    def restore(self, slot: int, snapshot: Tensor) -> None:
        self._require_row(snapshot)
        self._ranks.tell(RestoreSlot(slot))
        self._group.scatter(
            self._parts.split(snapshot.to(self.buffer.storage.device, non_blocking=True)), self._row(slot)
        )


class FollowingPool(StatePool):
    """The slots of another rank, which does as rank 0 does."""

    def give(self, slot: int, model: ShardedModel) -> None:
        """Rank 0's `take`."""
        model.group.gather(self._row(slot))

    def receive(self, slot: int, model: ShardedModel) -> None:
        """Rank 0's `restore`."""
        model.group.scatter(None, self._row(slot))
