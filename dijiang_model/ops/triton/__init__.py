"""Triton kernels of the attention operator, for CUDA devices; importing this needs `triton`."""

from dijiang_model.ops.triton.attention import TritonAttention

__all__ = ["TritonAttention"]
