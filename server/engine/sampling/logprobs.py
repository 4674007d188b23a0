"""Log-probabilities of a step, on the device, for the rows that ask: one packed table on its way to the host.

They are computed from the logits as the model gives them, so before the sampler works on those. Rows are taken in
blocks, so that beside the logits themselves only a block's worth of the vocabulary is in memory.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.engine.batch import Batch
from server.engine.sequence import Chunk
from server.engine.transfer import Field, Transfer, TransferredFields
from server.engine.types.logprobs import LogprobTable, StepLogprobs

BLOCK_ROWS = 64


@dataclass(frozen=True, slots=True)
class LogprobPlan:
    """The A rows of a step that ask: A1 sampled ones, then A2 of prompts.

    Attributes:
        sampled: for each of the A1, its place in `Batch.sampled`.
        sampled_rows: [A1] int64, the same on the device.
        scored: chunks of whose tokens the followers are scored, by their place in `Batch.chunks`.
        targets: [A2] int64, those followers.
        num_top: most of the most likely tokens that any row asks for.
        extras: [A, E] int64, further tokens of each row, filled up with 0; None: no row has any.
        num_extra: E.
    """

    sampled: tuple[int, ...]
    sampled_rows: Field
    scored: tuple[int, ...]
    targets: Field
    num_top: int
    extras: Field | None
    num_extra: int

    @classmethod
    def prepare(cls, batch: Batch, transfer: Transfer) -> "LogprobPlan | None":
        """Plans a step's log-probabilities; None when nobody asks for any."""
        sampled = [
            number
            for number, chunk in enumerate(batch.sampled)
            if chunk.sequence.request.logprobs.num_output is not None
        ]
        scored = [number for number, chunk in enumerate(batch.chunks) if chunk.num_scored > 0]
        if not (sampled or scored):
            return None
        outputs = [batch.sampled[number].sequence.request.logprobs for number in sampled]
        prompts = [batch.chunks[number].sequence.request.logprobs for number in scored]
        tops = [options.num_output or 0 for options in outputs] + [options.num_prompt or 0 for options in prompts]
        rows = [options.token_ids for options in outputs]
        rows += [()] * sum(batch.chunks[number].num_scored for number in scored)
        num_extra = max(map(len, rows))
        padded = (token_id for ids in rows for token_id in (*ids, *(0,) * (num_extra - len(ids))))
        return cls(
            sampled=tuple(sampled),
            sampled_rows=transfer.integers(sampled),
            scored=tuple(scored),
            targets=transfer.integers(
                token_id for number in scored for token_id in batch.chunks[number].scored_token_ids
            ),
            num_top=max(tops),
            extras=transfer.integers(padded) if num_extra else None,
            num_extra=num_extra,
        )

    def keep(self, logits: Tensor, arrived: TransferredFields) -> Tensor:
        """Logits [R, vocab] -> [A1, vocab], a copy of the sampled rows that ask, before the sampler changes them."""
        return logits[arrived[self.sampled_rows]]

    def compute(self, kept: Tensor, prompt_logits: Tensor, token_ids: Tensor, arrived: TransferredFields) -> Tensor:
        """Device side, nothing read back.

        Args:
            kept: [A1, vocab] of `keep`.
            prompt_logits: [A2, vocab], untouched.
            token_ids: [S] int64, the sampled tokens of the whole step.
            arrived: the transfer that the plan was prepared into.

        Returns:
            [A, 2 * (1 + num_top + E) + 1] int32: token ids, values (the bits of fp32), rank.
        """
        targets = torch.cat((token_ids[arrived[self.sampled_rows]].clamp(min=0), arrived[self.targets]))
        extras = None if self.extras is None else arrived[self.extras].view(-1, self.num_extra)
        blocks = []
        for start, logits in ((0, kept), (len(kept), prompt_logits)):
            for offset in range(0, len(logits), BLOCK_ROWS):
                block = logits[offset : offset + BLOCK_ROWS]
                rows = slice(start + offset, start + offset + len(block))
                blocks.append(self._block(block, targets[rows], None if extras is None else extras[rows]))
        return torch.cat(blocks)

    def _block(self, logits: Tensor, targets: Tensor, extras: Tensor | None) -> Tensor:
        """[b, vocab], [b] and [b, E] -> [b, 2 * (1 + num_top + E) + 1] int32."""
        logprobs = logits.float().log_softmax(dim=-1)
        columns = [targets.unsqueeze(1)] if extras is None else [targets.unsqueeze(1), extras]
        if self.num_top > 0:
            columns.insert(1, logprobs.topk(min(self.num_top, logits.shape[-1]), dim=-1).indices)
        token_ids = torch.cat(columns, dim=1)
        values = logprobs.gather(1, token_ids)
        ranks = (logprobs > values[:, :1]).sum(dim=-1, keepdim=True) + 1
        return torch.cat((token_ids.int(), values.view(torch.int32), ranks.int()), dim=1)

    def tables(self, packed: Tensor, batch: Batch) -> StepLogprobs:
        """Host side: the packed rows, flat, as one table for each sequence that asks."""
        num_rows = len(self.sampled) + sum(batch.chunks[number].num_scored for number in self.scored)
        rows = packed.view(num_rows, -1).numpy()
        width = (rows.shape[1] - 1) // 2
        sampled: dict[int, LogprobTable] = {}
        prompts: dict[int, LogprobTable] = {}
        begin = 0
        for number in self.sampled:
            options = batch.sampled[number].sequence.request.logprobs
            sampled[number] = _table(rows[begin : begin + 1], width, options.num_output, len(options.token_ids), self)
            begin += 1
        for number in self.scored:
            chunk = batch.chunks[number]
            options = chunk.sequence.request.logprobs
            block = rows[begin : begin + chunk.num_scored]
            prompts[number] = _table(block, width, options.num_prompt, 0, self)
            begin += chunk.num_scored
        return StepLogprobs(sampled, prompts)


def scored_rows(chunks: Items[Chunk]) -> list[int]:
    """Rows of a step's tokens whose followers are scored, in the order of `LogprobPlan.targets`."""
    rows: list[int] = []
    begin = 0
    for chunk in chunks:
        rows += range(begin, begin + chunk.num_scored)
        begin += chunk.length
    return rows


def _table(rows: NDArray[np.int32], width: int, num_top: int | None, num_extra: int, plan: LogprobPlan) -> LogprobTable:
    """Takes a sequence's own columns out of the widest ones of the step."""
    num_shown = width - 1 - plan.num_extra  # a small vocabulary has no more than that
    columns = [0, *range(1, 1 + min(num_top or 0, num_shown)), *range(1 + num_shown, 1 + num_shown + num_extra)]
    return LogprobTable(
        len(columns),
        rows[:, columns].tobytes(),
        rows[:, [width + column for column in columns]].tobytes(),
        rows[:, -1].tobytes(),
    )
