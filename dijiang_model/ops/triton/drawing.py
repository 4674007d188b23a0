"""Draws tokens: launches `kernels.drawing`, once for all rows. Nothing asks the device, so it may be recorded."""

import torch
from torch import Tensor

from dijiang_model.ops.drawing import Draws
from dijiang_model.ops.triton.device import OPTIONS, on_device_of
from dijiang_model.ops.triton.kernels.drawing import draw_kernel

LINES, LANES, WARPS = 4, 2048, 16
"""A program goes through its row in tiles of lines times lanes, four logits of each line to a thread: so many loads are
on their way at a time. To be measured."""


def drawn_tokens(logits: Tensor, draws: Draws, *, is_checked: bool = False) -> Tensor:
    """[M, vocab] fp32 -> [M] int64; see `selection.drawn_tokens`, and `chosen_tokens` for `is_checked`.

    The weights are those of torch up to some roundings, the exponential being the device's. A row's token is the same
    beside any others.
    """
    assert draws.typical_p is None
    logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    # What no row uses is never read, and numbers of the same type stand for it: one compiled kernel for all.
    reals, integers = draws.uniforms, draws.uniforms.view(torch.int64)
    if num_rows > 0:
        with on_device_of(logits):
            draw_kernel[(num_rows,)](
                logits,
                reals,
                draws.temperatures,
                reals if draws.min_p is None else draws.min_p,
                integers if draws.top_k is None else draws.top_k,
                reals if draws.top_p is None else draws.top_p,
                tokens,
                vocab_size,
                int(draws.min_p is not None),
                int(draws.top_k is not None),
                int(draws.top_p is not None),
                int(is_checked),
                LINES=LINES,
                LANES=LANES,
                num_warps=WARPS,
                **OPTIONS,
            )
    return tokens
