"""How the teacher attends to tokens that have left the window, row block by row block."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dijiang_model.conversion.calibration.contexts import Recalled
from dijiang_model.conversion.calibration.teacher_pass import LayerInputs

ROW_STRIDE = 4
"""Every so many queries are looked at."""
ROWS = 128
"""Queries at a time: their probabilities are [G, R, rows, T]."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention to the tokens of one context from queries that are further away than the window.

    Attributes:
        largest: [G, T] largest probability that any query of the group gives the token.
        mean: [G, T] mean over those queries; both 0 where no query looks.
        queries: [T] queries that look.
    """

    largest: Tensor
    mean: Tensor
    queries: Tensor


def far_attention(inputs: LayerInputs, *, window: int) -> Attention:
    """Measures one context."""
    length, groups = inputs.k.shape[:2]
    largest, total = torch.zeros(groups, length), torch.zeros(groups, length)
    rows = torch.arange(window, length, ROW_STRIDE)
    token = torch.arange(length)
    for part in rows.split(ROWS):
        end = int(part[-1]) + 1
        probability = probabilities(inputs, part, end)
        far = probability.masked_fill_(token[:end] > (part - window)[:, None], 0.0)
        largest[:, :end] = torch.maximum(largest[:, :end], far.amax((1, 2)))
        total[:, :end] += far.sum(2).mean(1)
    queries = (rows[:, None] >= token + window).sum(0)
    return Attention(largest, total / queries.clamp(min=1), queries)


def probabilities(inputs: LayerInputs, rows: Tensor, end: int) -> Tensor:
    """Attention of the queries `rows` [N], all below `end`, to the tokens [0, end): [G, R, N, end]."""
    query = inputs.q[rows].permute(1, 2, 0, 3) * inputs.q.shape[-1] ** -0.5
    scores = query @ inputs.k[:end].permute(1, 2, 0)[:, None]
    is_future = torch.arange(end) > rows[:, None]
    scores.masked_fill_(is_future, -torch.inf)
    probability: Tensor = scores.softmax(-1)
    return probability


def recall_attention(inputs: LayerInputs, recalled: Sequence[Recalled], *, window: int) -> Tensor:
    """[G] attention from the answers' queries to what was told, summed over facts told further back than the window."""
    total = torch.zeros(inputs.k.shape[1])
    for fact in recalled:
        rows = torch.arange(fact.answered[0] - 1, fact.answered[1] - 1)
        if fact.told[1] <= fact.answered[0] - window:
            probability = probabilities(inputs, rows, fact.answered[1])
            total += probability[..., fact.told[0] : fact.told[1]].sum(-1).mean((1, 2))
    return total
