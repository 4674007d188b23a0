"""The families of models: one module for each, with a `Family` that says all that is to be known of it."""

from collections.abc import Mapping

import torch

from dijiang_model.config import ModelConfig
from dijiang_model.families.family import Family
from dijiang_model.families.gemma3 import GEMMA3
from dijiang_model.families.gpt_neox import GPT_NEOX
from dijiang_model.families.llama import LLAMA
from dijiang_model.families.mistral import MISTRAL
from dijiang_model.families.olmo2 import OLMO2
from dijiang_model.families.opt import OPT
from dijiang_model.families.phi3 import PHI3
from dijiang_model.families.qwen2 import QWEN2
from dijiang_model.families.qwen3 import QWEN3
from dijiang_model.model import DiJiangForCausalLM

FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (GEMMA3, GPT_NEOX, LLAMA, MISTRAL, OLMO2, OPT, PHI3, QWEN2, QWEN3)
}
"""By HF's `model_type`."""


def build_model(
    config: ModelConfig, *, device: torch.device | str = "meta", dtype: torch.dtype = torch.float32
) -> DiJiangForCausalLM:
    """An uninitialised model of a configuration; load its parameters, then call `prepare()`.

    Args:
        device: `meta` (the default) allocates nothing and is filled with `load_state_dict(..., assign=True)`.
        dtype: of the weights; the kernel's own parameters are fp32 (fp64 in a fp64 model).
    """
    with torch.device(device):
        return FAMILIES[config.family].network(config, dtype=dtype)
