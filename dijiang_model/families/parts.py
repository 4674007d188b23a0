"""Small parts that the families share: activation functions by HF's names, uninitialised embeddings."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_fast": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}
"""`gelu_new` and `gelu_fast` are the same tanh approximation written out in other words."""


def empty_embedding(num_rows: int, width: int, *, dtype: torch.dtype) -> nn.Embedding:
    """An embedding to be loaded: torch's own initialisation, on `meta`, imports its compiler for two seconds."""
    return nn.Embedding(num_rows, width, _weight=torch.empty(num_rows, width, dtype=dtype))
