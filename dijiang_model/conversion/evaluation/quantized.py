"""The model as it is served, with weights and states in fewer bits: what `dijiang evaluate --rounded` compares."""

from collections.abc import Mapping, Sequence

import torch

from dijiang_model.checkpoints.quantized import choose, quantize_
from dijiang_model.conversion.evaluation.evaluate import Variant
from dijiang_model.conversion.evaluation.wanted import Rounding
from dijiang_model.families import build_model
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops.torch.attention import TorchAttention
from dijiang_model.quantization.tensors import InMemory

_STATES: Mapping[Rounding, torch.dtype] = {"bfloat16-state": torch.bfloat16, "int8-state": torch.int8}


def quantized_variants(model: DiJiangForCausalLM, kinds: Sequence[Rounding]) -> list[Variant]:
    """One for each kind; weights are shared as far as they are not rounded."""
    return [_rounded(model, kind) for kind in kinds]


def _rounded(model: DiJiangForCausalLM, kind: Rounding) -> Variant:
    twin = build_model(model.config, device="meta", dtype=model.dtype)
    twin.load_state_dict(model.state_dict(), strict=True, assign=True)
    if kind == "int8" or kind == "int4":
        name = f"ours, weights in {kind}"
        quantize_(twin, choose(kind, InMemory(model.state_dict()), twin))
    else:
        name = f"ours, state in {kind.removesuffix('-state')}"
        twin.keep_states_in(_STATES[kind]).prepare()
    return Variant(name, twin, TorchAttention(), twin.state_spec.bytes_per_slot, is_served=True)
