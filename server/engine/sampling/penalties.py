"""Which tokens a penalised sequence has seen, counted on the device.

Only sequences with a penalty get a row here, from their first sampled token to their end; the tables
grow with the most that were ever penalised at once. Rows are zeroed when they are given back.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.sequence import Chunk, Sequence
from server.engine.transfer import Field, Transfer, TransferredFields


@dataclass(frozen=True, slots=True)
class PenaltyPlan:
    """The penalised rows of one step; M of them.

    Attributes:
        rows: [M] int64, their rows in the step's logits.
        entries: [M] int64, their rows in the tables.
        repetition: [M] float64; None: no row uses it.
        presence, frequency: [M] float64.
        started: (table row, prompt tokens, output tokens so far) of those that sample for the first time here.
        assumed: None: no row has drafts before it; else what those say.
    """

    rows: Field
    entries: Field
    repetition: Field | None
    presence: Field
    frequency: Field
    started: tuple[tuple[int, Field, Field], ...]
    assumed: "AssumedPlan | None"


@dataclass(frozen=True, slots=True)
class AssumedPlan:
    """Drafts that are taken to come before the sampled tokens of some of the M rows.

    Attributes:
        places, token_ids: [A] int64: a place among the M rows, and a token before it; one pair for each such token.
        firsts: [M] int64, the place of the first row of the same sequence.
        previous: [M] int64, the draft just before the row; any for first rows.
    """

    places: Field
    token_ids: Field
    firsts: Field
    previous: Field

    @classmethod
    def prepare(cls, chunks: Items[Chunk], transfer: Transfer) -> "AssumedPlan | None":
        """Of the M penalised rows' chunks."""
        if not any(chunk.drafts for chunk in chunks):
            return None
        pairs = [(place, token_id) for place, chunk in enumerate(chunks) for token_id in chunk.drafts]
        return cls(
            places=transfer.integers(place for place, _ in pairs),
            token_ids=transfer.integers(token_id for _, token_id in pairs),
            firsts=transfer.integers(place - len(chunk.drafts) for place, chunk in enumerate(chunks)),
            previous=transfer.integers(chunk.drafts[-1] if chunk.drafts else 0 for chunk in chunks),
        )

    def are_confirmed(self, token_ids: Tensor, arrived: TransferredFields) -> Tensor:
        """[M] int64 sampled tokens -> [M] bool: whether all drafts before them were sampled too."""
        firsts = arrived[self.firsts]
        is_first = firsts == torch.arange(len(firsts), device=firsts.device)
        misses = ((token_ids.roll(1) != arrived[self.previous]) & ~is_first).cumsum(dim=0)
        return misses == misses[firsts]


def is_penalised(sequence: Sequence) -> bool:
    """Whether the request sets any penalty to other than its neutral value."""
    sampling = sequence.sampling
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)


class PenaltyTables:
    """Prompt tokens seen and output tokens counted, one row for each penalised sequence."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._in_prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)  # [E, vocab]
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)  # [E, vocab]
        self._free: list[int] = []
        self._entries: dict[Sequence, int] = {}

    def prepare(self, chunks: Items[Chunk], transfer: Transfer) -> PenaltyPlan | None:
        """Plans one step; None when it penalises nobody.

        Args:
            chunks: those of the step that sample, in the order of its logits.
            transfer: takes what the device needs.
        """
        rows = [row for row, chunk in enumerate(chunks) if is_penalised(chunk.sequence)]
        if not rows:
            return None
        started = []
        for row in rows:
            sequence = chunks[row].sequence
            if sequence not in self._entries:
                self._entries[sequence] = entry = self._allocate()
                prompt = sequence.request.prompt_token_ids
                before = sequence.request.resumed
                num_prompt = len(prompt) - (0 if before is None else before.num_outputs)
                fields = (transfer.integers(prompt[:num_prompt]), transfer.integers(prompt[num_prompt:]))
                started.append((entry, *fields))
        sequences = [chunks[row].sequence for row in rows]
        repetition = [sequence.sampling.repetition_penalty for sequence in sequences]
        return PenaltyPlan(
            rows=transfer.integers(rows),
            entries=transfer.integers(self._entries[sequence] for sequence in sequences),
            repetition=transfer.reals(repetition) if any(value != 1 for value in repetition) else None,
            presence=transfer.reals(sequence.sampling.presence_penalty for sequence in sequences),
            frequency=transfer.reals(sequence.sampling.frequency_penalty for sequence in sequences),
            started=tuple(started),
            assumed=AssumedPlan.prepare([chunks[row] for row in rows], transfer),
        )

    def apply(self, logits: Tensor, plan: PenaltyPlan, arrived: TransferredFields) -> None:
        """Penalises the planned rows of logits [R, vocab] fp32, in place."""
        for entry, prompt, outputs in plan.started:
            self._in_prompt[entry].index_fill_(0, arrived[prompt], True)
            before = arrived[outputs]
            self._counts[entry].index_add_(0, before, torch.ones_like(before, dtype=self._counts.dtype))
        rows, entries = arrived[plan.rows], arrived[plan.entries]
        counts = self._counts[entries]  # [M, vocab]
        if plan.assumed is not None:
            index = (arrived[plan.assumed.places], arrived[plan.assumed.token_ids])
            counts.index_put_(index, torch.ones_like(index[0], dtype=counts.dtype), accumulate=True)
        penalised = logits[rows]  # [M, vocab]
        if plan.repetition is not None:
            is_seen = self._in_prompt[entries] | (counts > 0)
            factor = torch.where(is_seen, _column(plan.repetition, arrived), 1.0)
            # Without a branch on the sign: the positive part is divided, the negative one multiplied.
            penalised = penalised.clamp(min=0) / factor + penalised.clamp(max=0) * factor
        penalised -= counts * _column(plan.frequency, arrived)
        penalised -= (counts > 0) * _column(plan.presence, arrived)
        logits[rows] = penalised

    def count(self, token_ids: Tensor, plan: PenaltyPlan, arrived: TransferredFields) -> None:
        """Notes the sampled tokens [R] int64 of the planned rows."""
        sampled = token_ids[arrived[plan.rows]]
        index = (arrived[plan.entries], sampled)
        if plan.assumed is None:
            self._counts[index] += 1
        else:  # the same token may come several times in one sequence; behind a wrong draft none counts
            are_confirmed = plan.assumed.are_confirmed(sampled, arrived)
            self._counts.index_put_(index, are_confirmed.to(self._counts.dtype), accumulate=True)

    def release(self, sequence: Sequence) -> None:
        """Forgets an ended sequence; nothing happens if it never was penalised."""
        entry = self._entries.pop(sequence, None)
        if entry is not None:
            self._in_prompt[entry].zero_()
            self._counts[entry].zero_()
            self._free.append(entry)

    def _allocate(self) -> int:
        if not self._free:
            num_entries = len(self._counts)
            added = max(1, num_entries)
            self._in_prompt = torch.cat((self._in_prompt, self._in_prompt.new_zeros(added, self._in_prompt.shape[1])))
            self._counts = torch.cat((self._counts, self._counts.new_zeros(added, self._counts.shape[1])))
            self._free = list(range(num_entries, num_entries + added))
        return self._free.pop()


def _column(field: Field, arrived: TransferredFields) -> Tensor:
    return arrived[field].float().unsqueeze(1)  # [M, 1] fp32
