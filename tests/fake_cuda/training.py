"""Training on the device without memory: losses, and what is done with gradients. The gradients are zeros: torch's
engine for them asks for a true device."""

import pytest
import torch
from torch import Tensor

from dijiang_model.conversion.training.adapters import AdapterInfo
from dijiang_model.conversion.training.train import Trainer, TrainingOptions
from dijiang_model.model import DiJiangForCausalLM

LENGTH = 64


class Zeros:
    """A text of which nothing but the length is known."""

    def batch(self, step: int, size: int) -> Tensor:
        return torch.zeros((size, LENGTH), dtype=torch.int64)


def trained_stages(model: DiJiangForCausalLM) -> list[int]:
    """The stages of four steps."""
    options = TrainingOptions(
        tokens=4 * LENGTH,
        minutes=None,
        stages=(1, 2),
        stage_one_share=0.5,
        sequence_length=LENGTH,
        batch_size=1,
        learning_rate=1e-3,
        lora_rank=2,
        precision="bf16",
        linear=True,
        seed=3,
    )
    info = AdapterInfo(base="none", fingerprint="none", tokens_trained=0, lora_rank=2, recipe="none")
    trainer = Trainer(model, Zeros(), options, info=info)

    def backward(loss: Tensor, gradient: Tensor | None = None) -> None:
        assert loss.requires_grad
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "backward", backward)
        return [trainer.step()["stage"] for _ in range(4)]
