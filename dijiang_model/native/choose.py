"""Greedy choices by the compiled kernels."""

from ctypes import CDLL

import torch
from torch import Tensor

NOT_FINITE = -1
"""In the place of a token: not all logits of the row are finite."""


def greedy_tokens(logits: Tensor, library: CDLL) -> Tensor:
    """The first of the largest logits of each row, or `NOT_FINITE`; one pass, in as many threads as torch has.

    Args:
        logits: [R, vocab] fp32 on the CPU.
        library: of `library.load_library`.

    Returns:
        [R] int64.
    """
    assert logits.dtype == torch.float32
    assert logits.device.type == "cpu"
    logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64)
    library.dijiang_greedy(logits.data_ptr(), num_rows, vocab_size, tokens.data_ptr(), torch.get_num_threads())
    return tokens
