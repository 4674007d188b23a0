"""What a step of training costs in time, memory and disk, from the sizes of model and batch."""

import time
from dataclasses import dataclass

import torch

from dijiang_model.conversion.training.train import TrainingOptions
from dijiang_model.formats.sizes import size_text
from dijiang_model.model import DiJiangForCausalLM

PASSES = 8
"""Of 1 FLOP for each weight and token: the teacher's forward pass (2), the student's (2) and its backward pass (4)."""
BYTES_OF_TRAINED = 16
"""Value, gradient and Adam's two moments, in fp32."""
PROBE_ROWS = 256
PROBES = 5
"""Of which the fastest counts: another process may have had the processor for a moment."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """An estimate; stage 2's, which is the dearer one.

    Attributes:
        tokens: of a step.
        flops: of its products with weights.
        memory_bytes: weights, what is trained, activations and logits.
        disk_bytes: of the run's folder: adapter and checkpoint.
    """

    tokens: int
    flops: int
    memory_bytes: int
    disk_bytes: int

    def text(self, flops_per_s: float) -> str:
        """Returns the sentence that is printed before a run."""
        return (
            f"A step reads {self.tokens:,} tokens: about {self.flops / flops_per_s:,.1f} s here, "
            f"{size_text(self.memory_bytes)} of memory; the run keeps {size_text(self.disk_bytes)} on disk"
        )


def step_cost(model: DiJiangForCausalLM, options: TrainingOptions, *, num_trained: int) -> StepCost:
    """Returns the cost of a step with `num_trained` trained numbers."""
    config, tokens = model.config, options.sequence_length * options.batch_size
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    activations = tokens * config.num_layers * (8 * config.hidden_size + 3 * config.intermediate_size) * 4
    logits = 3 * tokens * config.vocab_size * 4
    return StepCost(
        tokens,
        PASSES * model.num_parameters * tokens,
        weights + BYTES_OF_TRAINED * num_trained + activations + logits,
        BYTES_OF_TRAINED * num_trained,
    )


def measured_speed(model: DiJiangForCausalLM) -> float:
    """Returns FLOPs a second of one product of the MLP's size, on the model's device; never 0."""
    config = model.config
    x = torch.zeros((PROBE_ROWS, config.hidden_size), device=model.device)
    weight = torch.zeros((config.intermediate_size, config.hidden_size), device=model.device)
    torch.nn.functional.linear(x, weight).sum().item()
    seconds = []
    for _ in range(PROBES):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight).sum().item()
        seconds.append(time.perf_counter() - started)
    return 2 * PROBE_ROWS * weight.numel() / max(min(seconds), 1e-6)
