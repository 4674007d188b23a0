"""Low-rank updates of the attention's projections: attached for training, merged for everything else."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from dijiang_model.model import DiJiangForCausalLM

DOWN, UP = "lora_down", "lora_up"


class LoraLinear(nn.Module):
    """`base(x) + up(down(x))`; starts as `base`, which stays frozen.

    Parameters (fp32, fp64 in a fp64 model): lora_down [rank, in], lora_up [out, rank].
    """

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.is_active = True
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        noise = torch.randn((rank, base.in_features), generator=generator) / math.sqrt(base.in_features)
        self.lora_down = nn.Parameter(noise.to(device=base.weight.device, dtype=dtype))
        self.lora_up = nn.Parameter(torch.zeros((base.out_features, rank), dtype=dtype, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base(x)
        if not self.is_active:
            return output
        low = functional.linear(x.to(self.lora_down.dtype), self.lora_down)
        return output + functional.linear(low, self.lora_up).to(output.dtype)


def attach_lora(model: DiJiangForCausalLM, *, rank: int, seed: int) -> dict[str, LoraLinear]:
    """Puts an update of `rank` on every projection of every attention, in place.

    Returns:
        The updates by the checkpoint name of the weight that they change.
    """
    generator = torch.Generator().manual_seed(seed)
    attached: dict[str, LoraLinear] = {}
    for layer, attention in enumerate(model.attentions):
        prefix = model.paths.attention_of(layer)
        for path in model.paths.attention_projections:
            name = path.rpartition(".")[2]
            base = getattr(attention, name)
            if isinstance(base, nn.Linear):
                update = LoraLinear(base, rank, generator)
                setattr(attention, name, update)
                attached[f"{prefix}.{name}.weight"] = update
    return attached


@contextmanager
def inactive(updates: Mapping[str, LoraLinear]) -> Iterator[None]:
    """The model without its updates: the teacher, as long as the block runs."""
    for update in updates.values():
        update.is_active = False
    try:
        yield
    finally:
        for update in updates.values():
            update.is_active = True


def factors(updates: Mapping[str, LoraLinear]) -> dict[str, Tensor]:
    """`<weight name>.lora_down` and `.lora_up`, detached."""
    found: dict[str, Tensor] = {}
    for name, update in updates.items():
        found[f"{name}.{DOWN}"] = update.lora_down.detach()
        found[f"{name}.{UP}"] = update.lora_up.detach()
    return found


def merged(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """weight + up @ down in weight's dtype, the sum in fp32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + up.to(wide) @ down.to(wide)).to(weight.dtype)
