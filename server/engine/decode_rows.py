"""The model's input of steps in which every sequence decodes one token, kept from one step to the next.

As long as the same sequences go on, all that changes is that every position is one further: on a processor, making the
same small tensors anew took longer than a hundredth of a step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dijiang_model.model import PackedBatch
from server.engine.scheduler import Batch


@dataclass(frozen=True, slots=True)
class DecodeInput:
    """N rows.

    Attributes:
        slots: [N] int64.
        positions: [N] int64; those of the last step go on to be those of the next one.
        rows: [N] int64, 0 to N - 1.
        lengths: N times 1.
    """

    slots: Tensor
    positions: Tensor
    rows: Tensor
    lengths: tuple[int, ...]

    def packed(self, last_token_ids: Tensor) -> PackedBatch:
        """The step after these last tokens of all slots, [P] int64."""
        return PackedBatch(
            token_ids=last_token_ids.index_select(0, self.slots),
            positions=self.positions,
            slots=self.slots,
            lengths=self.lengths,
            num_decode=len(self.lengths),
            logit_rows=self.rows,
        )


class DecodeRows:
    """Makes and keeps `DecodeInput`s, for a device on which a step is over when it was launched."""

    def __init__(self) -> None:
        self._slots: list[int] = []
        self._next_positions: list[int] = []
        self._input: DecodeInput | None = None

    def of(self, batch: Batch) -> DecodeInput | None:
        """The input of a step; None if some of its chunks are more than one decoded token."""
        chunks = batch.chunks
        if batch.num_decode < len(chunks):
            return None
        slots = [chunk.slot for chunk in chunks]
        positions = [chunk.position for chunk in chunks]
        if self._input is not None and slots == self._slots and positions == self._next_positions:
            self._input.positions.add_(1)
        else:
            num_rows = len(chunks)
            self._input = DecodeInput(
                torch.tensor(slots), torch.tensor(positions), torch.arange(num_rows), (1,) * num_rows
            )
        self._slots, self._next_positions = slots, [position + 1 for position in positions]
        return self._input
