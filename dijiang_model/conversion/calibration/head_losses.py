"""What a head's answer loses with so many anchors, measured on the teacher's own inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dijiang_model.config import AnchorConfig
from dijiang_model.conversion.calibration.far_attention import probabilities
from dijiang_model.conversion.calibration.teacher_pass import LayerInputs


def priorities(scores: Tensor, rule: AnchorConfig) -> Tensor:
    """p_j of tokens in order of time, from their scores [T, O]: [O, T] fp64; see `dijiang_model/README.md`."""
    rounded = (scores.T / rule.grid).round() * rule.grid
    largest = functional.max_pool1d(rounded[None], 2 * rule.span + 1, stride=1, padding=rule.span)[0]
    return largest.double() + rule.age * torch.arange(scores.shape[0], dtype=torch.float64)


def ranks(priority: Tensor, *, sinks: int) -> Tensor:
    """[T, T] int16: entry [j, i] is how many tokens up to i go before token j when places are scarce.

    With A anchors token j is kept, once token i has left the window, if its rank is below A.
    """
    order = torch.arange(len(priority))
    is_better = priority > priority[:, None]
    is_better |= (priority == priority[:, None]) & (order > order[:, None])
    is_better[:, :sinks] = False
    return is_better.cumsum(1, dtype=torch.int16)


def answer_losses(
    inputs: LayerInputs,
    priority: Tensor,
    rows: Tensor,
    *,
    output_weight: Tensor,
    sizes: Sequence[int],
    window: int,
    sinks: int,
) -> Tensor:
    """[P, G, len(sizes)]: what each head's answers lose with so many anchors, for each of P predictors.

    The squared error after the output projection over the squared input of the layer's block, summed over the rows.

    Args:
        priority: [P, G, T].
        rows: [N] queries, each beyond the window.
        output_weight: [D, H * d].
        sizes: numbers of anchors.
    """
    num_kv_heads, head_size = inputs.k.shape[1:]
    token = torch.arange(len(inputs.k))
    probability = probabilities(inputs, rows, len(token))  # [G, R, N, T]
    is_near = (rows[:, None] - token < window) | (token < sinks)
    weights = output_weight.unflatten(1, (num_kv_heads, -1, head_size))  # [D, G, R, d]
    losses = torch.zeros(*priority.shape[:2], len(sizes))
    for head in range(num_kv_heads):
        value = inputs.v[:, head]
        full = probability[head] @ value
        for number, own in enumerate(priority[:, head]):
            rank = ranks(own, sinks=sinks)[:, rows - window].T
            for column, num in enumerate(sizes):
                kept = probability[head] * (is_near | (rank < num))
                error = kept @ value / kept.sum(-1, keepdim=True) - full  # [R, N, d]
                after = torch.einsum("rnd,erd->ne", error, weights[:, head])
                losses[number, head, column] = (after.square().sum(1) / inputs.energy[rows]).sum()
    return losses
