"""Tokens drawn by inverse CDF in torch: anywhere, and the twin of kernels that are many times faster.

Those are `native.draw` on CPUs and `ops.triton.drawing` on CUDA devices; neither has typical-p.
"""

import math

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dijiang_model.native.choose import NOT_FINITE
from dijiang_model.ops.drawing import Draws


def drawn_tokens(logits: Tensor, draws: Draws) -> Tensor:
    """[M, vocab] fp32 -> [M] int64, by inverse CDF over the tokens that the filters leave."""
    scores = logits - logits.amax(dim=-1, keepdim=True)  # before the division: the best stays 0, never NaN
    weights = scores.div_(_column(draws.temperatures)).exp_()  # [M, vocab]; the best weighs 1
    if draws.min_p is not None:
        weights *= weights >= _column(draws.min_p)
    if draws.top_k is not None:
        weights *= logits >= _top_k_floor(logits, draws.top_k, draws.max_top_k)
    if draws.top_p is not None:
        weights *= weights >= _top_p_floor(weights, draws.top_p)
    if draws.typical_p is not None:
        weights *= _is_typical(weights, draws.typical_p)
    # fp64: no tail token is rounded away. Converted apart, for a converting cumsum is 8 times slower on CPUs.
    mass = weights.double().cumsum(dim=-1)
    targets = draws.uniforms.unsqueeze(1) * mass[:, -1:]
    token_ids = torch.searchsorted(mass, targets, right=True).squeeze(1)
    return token_ids.clamp_(max=logits.shape[-1] - 1)  # only a row of NaN ever points behind the end


def chosen_tokens(logits: Tensor, draws: Draws, *, is_greedy: bool) -> Tensor:
    """[M, vocab] fp32 -> [M] int64; see `selection.chosen_tokens`."""
    is_finite = torch.isfinite(logits.sum(dim=-1))
    tokens = logits.argmax(dim=-1)
    if not is_greedy:
        tokens = torch.where(draws.temperatures > 0, drawn_tokens(logits, draws), tokens)
    return tokens.masked_fill_(~is_finite, NOT_FINITE)  # a number of the host, which no recording may wait for


def _top_k_floor(logits: Tensor, top_k: Tensor, max_top_k: int) -> Tensor:
    """[M, vocab] -> [M, 1], the k-th best logit of each row; -inf where k is the vocabulary's size."""
    best = logits.topk(max_top_k, dim=-1).values  # [M, max_top_k]
    kth = best.gather(1, (top_k - 1).clamp(max=max_top_k - 1).unsqueeze(1))
    return kth.masked_fill_((top_k > max_top_k).unsqueeze(1), -math.inf)


def _top_p_floor(weights: Tensor, top_p: Tensor) -> Tensor:
    """[M, vocab] -> [M, 1], the lowest weight in the smallest set that reaches top_p; 0 where it is off."""
    total = weights.sum(dim=-1, keepdim=True, dtype=torch.float64)  # [M, 1]
    best = _heaviest(weights, total, top_p.unsqueeze(1))  # [M, n]
    masses = best.double()
    mass_before = masses.cumsum(dim=-1) - masses
    num_kept = (mass_before < top_p.unsqueeze(1) * total).sum(dim=-1, keepdim=True)
    return best.gather(1, (num_kept - 1).clamp_(min=0)).masked_fill_((top_p > 1).unsqueeze(1), 0.0)


def _is_typical(weights: Tensor, typical_p: Tensor) -> Tensor:
    """[M, vocab] -> [M, vocab] bool: locally typical tokens (Meister et al. 2022), at least one in each row."""
    probabilities = weights.double() / weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    information = -probabilities.log()  # inf for tokens that are left out already
    entropy = torch.special.entr(probabilities).sum(dim=-1, keepdim=True)
    # Rounded, so that equal weights are equally far whichever way their sums were rounded.
    distances = (information - entropy).abs().float()
    nearest = distances.sort(dim=-1)
    masses = probabilities.gather(1, nearest.indices)
    num_kept = (masses.cumsum(dim=-1) - masses < typical_p.unsqueeze(1)).sum(dim=-1, keepdim=True)
    is_kept: Tensor = distances <= nearest.values.gather(1, (num_kept - 1).clamp_(min=0))
    return is_kept


def _heaviest(weights: Tensor, total: Tensor, top_p: Tensor) -> Tensor:
    """The heaviest weights of each row, sorted, [M, n]: at least those that reach top_p [M, 1].

    Tokens below (1 - top_p) * total / vocab weigh less than 1 - top_p together, so the others reach it.
    Picking those out first is ten times faster than sorting whole rows on a CPU. A CUDA device would have
    to wait for their number.
    """
    if weights.device.type == "cuda":
        return weights.sort(dim=-1, descending=True).values
    negligible = (1 - top_p) * total / weights.shape[-1]
    # Half of it, for rounding; rows without top-p need none.
    is_heavy = weights > torch.where(top_p > 1, math.inf, negligible / 2)
    if not is_heavy.any():
        return weights[:, :1]
    rows = weights[is_heavy].split(is_heavy.sum(dim=-1).tolist())
    return pad_sequence(rows, batch_first=True).sort(dim=-1, descending=True).values


def _column(numbers: Tensor) -> Tensor:
    return numbers.float().unsqueeze(1)  # [M, 1] fp32
