"""One step's input: packed tokens of variable-length sequences, without padding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dijiang_model.state import StateBuffer


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One step's input: the tokens of N sequences one after another.

    Attributes:
        token_ids: [T] int64 on the model's device.
        positions: [T] int64, each token's position in its own conversation, from 0.
        slots: [N] int64, the state slot of each sequence; distinct, but for scratch slot 0.
        lengths: tokens of each sequence, >= 1; they sum to T.
        num_decode: the first so many sequences have one token each and take the recurrent path.
        logit_rows: [R] int64, the tokens whose next-token logits are wanted.
        num_uncommitted: so many sequences behind those that decode leave their slots as they are, until
            `FrozenModel.advance`. Only where `can_defer`.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    lengths: tuple[int, ...]
    num_decode: int
    logit_rows: Tensor
    num_uncommitted: int = 0


Step = Callable[[PackedBatch, StateBuffer], Tensor]
"""A model, frozen or not: logits [R, vocab] of a step, which moves the slots of its sequences on in place."""


def prefill(
    model: Step, token_ids: Tensor, *, lengths: Sequence[int], slots: Tensor, starts: Tensor, state: StateBuffer
) -> Tensor:
    """Feeds a segment to each of N sequences; next-token logits of every token, [T, vocab].

    Args:
        token_ids: [T] int64, packed.
        lengths: tokens of each segment.
        slots, starts: [N] int64: slot, and position of the segment's first token.
    """
    tokens = torch.tensor(lengths, device=starts.device)
    first = torch.repeat_interleave(starts - (tokens.cumsum(0) - tokens), tokens)
    rows = torch.arange(len(token_ids), device=starts.device)
    return model(PackedBatch(token_ids, first + rows, slots, tuple(lengths), 0, rows), state)


def decode(model: Step, token_ids: Tensor, *, slots: Tensor, positions: Tensor, state: StateBuffer) -> Tensor:
    """Feeds one token to each of N sequences; next-token logits [N, vocab]. All tensors [N] int64."""
    num = len(token_ids)
    rows = torch.arange(num, device=token_ids.device)
    return model(PackedBatch(token_ids, positions, slots, (1,) * num, num, rows), state)
