"""By which tensors a base model is recognised, whatever dtype it is stored in."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dijiang_model.config import ModelConfig
from dijiang_model.formats.tensor_files import TensorInfo
from dijiang_model.model import DiJiangForCausalLM

SAMPLED_VALUES = 256


def fingerprint(config: ModelConfig, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> str:
    """SHA-256 over names, shapes and the first values of a base's tensors, hexadecimal.

    The DiJiang tensors do not count, as an adapter replaces them; values are rounded to bfloat16, so that the
    storage's dtype does not count either.
    """
    digest = hashlib.sha256(config.family.encode())
    for name in sorted(infos):
        if is_kernel_tensor(name):
            continue
        digest.update(f"{name} {list(infos[name].shape)}".encode())
        sample = read(name).reshape(-1)[:SAMPLED_VALUES].to(torch.bfloat16)
        digest.update(sample.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_kernel_tensor(name: str) -> bool:
    """Whether no teacher has it."""
    return ".linear." in name


def model_fingerprint(model: DiJiangForCausalLM) -> str:
    """`fingerprint` of a loaded model."""
    state = model.state_dict()
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    return fingerprint(model.config, infos, state.__getitem__)
