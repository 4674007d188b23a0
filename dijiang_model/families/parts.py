"""Small parts that the families share: activation functions by HF's names, uninitialised embeddings, RMSNorm."""

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


class RMSNorm(nn.Module):
    """x / rms(x) * (weight + offset) over the last dimension, computed in fp32 for narrower inputs."""

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        if self.offset == 0:
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x if x.dtype == torch.float64 else x.float()
        weight = self.weight.to(wide.dtype) + self.offset
        return functional.rms_norm(wide, self.weight.shape, weight, self.eps).to(x.dtype)


class AllHeadsNorm(RMSNorm):
    """RMSNorm over all heads together: [T, heads, d] -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)).view(x.shape)
