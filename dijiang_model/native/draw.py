"""Drawn tokens by the compiled kernels."""

from collections.abc import Sequence
from ctypes import CDLL

import torch
from torch import Tensor

from dijiang_model.native.structures import DrawRules


def sampled_tokens(logits: Tensor, rules: Sequence[DrawRules], library: CDLL) -> Tensor:
    """A token for each row by inverse CDF, in vocabulary order; rows are shared out over as many threads as torch has.

    Args:
        logits: [M, vocab] fp32 on the CPU; -inf: not this token.
        rules: of each row. `uniform` in [0, 1), `temperature` > 0; `min_p` 0, `top_k` the vocabulary's size or more,
            `top_p` more than 1: off. Each filter works on what the one before has left; equals are kept together.
        library: of `library.load_library`.

    Returns:
        [M] int64. Of a row with NaN any of its tokens.

    Raises:
        MemoryError: there was none.
    """
    assert logits.dtype == torch.float32
    assert logits.device.type == "cpu"
    logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    assert len(rules) == num_rows
    tokens = torch.zeros(num_rows, dtype=torch.int64)
    array = (DrawRules * num_rows)(*rules)
    if library.dijiang_draw(logits.data_ptr(), num_rows, vocab_size, array, tokens.data_ptr(), torch.get_num_threads()):
        raise MemoryError("there is no memory to draw tokens in")
    return tokens
