"""Permitted tokens of a step's rows as bits: they travel with the step's other lists, and become a mask on the device.

Only rows with a grammar or with `allowed_token_ids` cost anything: vocab / 8 bytes each on the way, and one pass over
their logits.
"""

import math
from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.sampling.forbidden import permit_only
from server.engine.sequence import Chunk
from server.engine.transfer import Field, Transfer, TransferredFields

_WORD_BITS = 64


@dataclass(frozen=True, slots=True)
class MaskPlan:
    """The M rows in which not every token is permitted.

    Attributes:
        rows: [M] int64, rows of the logits; None: all of them.
        words: [M * W] int64, a bit for each token, lowest first; W words hold the vocabulary.
        num_rows: M.
    """

    rows: Field | None
    words: Field
    num_rows: int


def prepare_masks(chunks: Items[Chunk], vocab_size: int, transfer: Transfer) -> MaskPlan | None:
    """Host side: asks what may come next in each of a step's rows; None if anything may.

    Args:
        chunks: those of the step that sample, in the order of its logits; every token before but drafts is accepted.
        vocab_size: width of the logits.
        transfer: takes the bits.
    """
    sequences = [chunk.sequence for chunk in chunks]
    rows = [row for row, one in enumerate(sequences) if one.constraint is not None or one.sampling.allowed_token_ids]
    if not rows:
        return None
    num_words = -(-vocab_size // _WORD_BITS)
    words = array("q", bytes(8 * num_words * len(rows)))
    for number, row in enumerate(rows):
        start = number * num_words
        constraint, allowed = sequences[row].constraint, sequences[row].sampling.allowed_token_ids
        if constraint is None:
            words[start : start + num_words] = array("q", [-1]) * num_words
        else:
            constraint.write_mask(words, start, after=chunks[row].drafts)
        if allowed:
            permit_only(words, start, num_words=num_words, token_ids=allowed)
    return MaskPlan(
        rows=transfer.integers(rows) if len(rows) < len(chunks) else None,
        words=transfer.integers(words),
        num_rows=len(rows),
    )


def apply_masks(logits: Tensor, plan: MaskPlan, arrived: TransferredFields) -> None:
    """Device side: -inf for every token that is not permitted in its row, in logits [R, vocab] fp32, in place."""
    is_forbidden = _unpack(arrived[plan.words], plan.num_rows)[:, : logits.shape[-1]]  # [M, vocab] bool
    if plan.rows is None:
        logits.masked_fill_(is_forbidden, -math.inf)
    else:
        rows = arrived[plan.rows]
        logits[rows] = logits[rows].masked_fill_(is_forbidden, -math.inf)


def _unpack(words: Tensor, num_rows: int) -> Tensor:
    """[M * W] int64 -> [M, W * 64] bool: whether the bit is 0. Bytes are little-endian wherever torch runs."""
    packed = words.view(torch.uint8).view(num_rows, -1, 1)  # [M, W * 8, 1]
    bits = torch.bitwise_left_shift(torch.ones(8, dtype=torch.uint8, device=words.device), _places(words.device))
    return ((packed & bits) == 0).view(num_rows, -1)


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
