"""The backbones: each family's blocks on top of the shared attention, with HF's tensor names."""

from collections.abc import Mapping

import torch

from dijiang_model.config import Family, ModelConfig
from dijiang_model.families.gpt_neox import GPTNeoXForCausalLM
from dijiang_model.families.llama import LlamaForCausalLM
from dijiang_model.families.opt import OPTForCausalLM
from dijiang_model.model import DiJiangForCausalLM

FAMILIES: Mapping[Family, type[GPTNeoXForCausalLM] | type[LlamaForCausalLM] | type[OPTForCausalLM]] = {
    "gpt_neox": GPTNeoXForCausalLM,
    "llama": LlamaForCausalLM,
    "opt": OPTForCausalLM,
}


def build_model(
    config: ModelConfig, *, device: torch.device | str = "meta", dtype: torch.dtype = torch.float32
) -> DiJiangForCausalLM:
    """An uninitialised model of a configuration; load its parameters, then call `prepare()`.

    Args:
        device: `meta` (the default) allocates nothing and is filled with `load_state_dict(..., assign=True)`.
        dtype: of the weights; the kernel's own parameters are fp32 (fp64 in a fp64 model).
    """
    with torch.device(device):
        return FAMILIES[config.family](config, dtype=dtype)
