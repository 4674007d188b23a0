"""The device that kernels are launched on, and options of every launch."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

OPTIONS = {"enable_fp_fusion": True}
"""Multiply-adds, whatever the version's default."""


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes a CUDA tensor's device the current one of this thread, if it is not; nothing for a tensor on the host."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
