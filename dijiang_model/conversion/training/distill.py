"""The two stages' losses. The teacher is the same model with full causal softmax, its updates switched off.

Stage 1: one pass of the teacher gives every layer its input and its target; each layer's linear part learns on
the spot, and only one layer's activations are kept at a time. Stage 2: the student's next-token distribution
follows the teacher's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from dijiang_model.attention import DiJiangAttention
from dijiang_model.conversion.training.lora import LoraLinear, inactive
from dijiang_model.conversion.training.process_group import ALONE, ProcessGroup
from dijiang_model.families import FAMILIES
from dijiang_model.kernel import LinearKernel
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import AttentionOp, LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.training.attention import HybridAttention, SoftmaxAttention
from dijiang_model.segments import run_segments

Precision = Literal["fp32", "bf16"]

HYBRID = HybridAttention()
HEAD_ROWS = 256
"""Rows of logits held at a time: [rows, vocab] three times."""


EARLY_OFFSET_TOKENS, MAX_OFFSET_TOKENS = 2048, 16384


def random_offset(generator: torch.Generator) -> int:
    """Where a segment shall seem to begin: half of them early, half anywhere up to `MAX_OFFSET_TOKENS`.

    Features see the rotation of a query or key itself, not a distance: trained from position 0 on alone, a linear part
    that removes 30 % of the window's error there removes half of that 1,024 tokens later, and adds to it at 4,096.
    """
    early = bool(torch.randint(2, (1,), generator=generator))
    return int(torch.randint(EARLY_OFFSET_TOKENS if early else MAX_OFFSET_TOKENS, (1,), generator=generator))


@dataclass(slots=True)
class AttentionErrors:
    """The teacher's attention, which on its way lets each layer's own attention learn from it (stage 1).

    An `AttentionOp`. The loss of a layer is the squared error after the output projection, over the target's
    square. Its gradients are added to the kernel's parameters at once.

    Attributes:
        output_maps: by identity of the kernel: its layer and output projection without bias.
        losses: [L] of the last pass.
        processes: whose batches count as one with this one.
    """

    output_maps: Mapping[int, tuple[int, Tensor]]
    losses: Tensor
    processes: ProcessGroup = ALONE
    teacher: SoftmaxAttention = field(default_factory=SoftmaxAttention)
    student: HybridAttention = field(default_factory=HybridAttention)

    @classmethod
    def of(cls, model: DiJiangForCausalLM, processes: ProcessGroup = ALONE) -> "AttentionErrors":
        maps = {
            id(attention.linear): (layer, output_weight(attention)) for layer, attention in enumerate(model.attentions)
        }
        return cls(maps, torch.zeros(len(maps)), processes)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
    ) -> Tensor:
        """See `ops.AttentionOp`; answers the teacher's output."""
        target = self.teacher(q, k, v, kernel=kernel, layout=layout, state=state)
        layer, weight = self.output_maps[id(kernel)]
        with torch.enable_grad():
            answer = self.student(q, k, v, kernel=kernel, layout=layout, state=state)
            error = functional.linear((answer - target).flatten(1).to(weight.dtype), weight)
            scale = functional.linear(target.flatten(1).to(weight.dtype), weight).float().square().sum()
            self.processes.average_([scale])
            loss = error.float().square().sum() / scale
            loss.backward()
        self.losses[layer] = loss.detach()
        return target


def output_weight(attention: DiJiangAttention) -> Tensor:
    """[hidden, H * d], the projection after the attention."""
    path = FAMILIES[attention.config.family].paths.output
    module = getattr(attention, path.rpartition(".")[2])
    weight: Tensor = module.base.weight if isinstance(module, LoraLinear) else module.weight
    return weight


def layer_losses(
    model: DiJiangForCausalLM,
    token_ids: Tensor,
    updates: Mapping[str, LoraLinear],
    *,
    offset: int = 0,
    precision: Precision = "fp32",
    processes: ProcessGroup = ALONE,
) -> Tensor:
    """Stage 1 on [N, T] tokens: adds gradients to the kernels' parameters; answers the layers' losses [L].

    Args:
        offset: see `segments_layout`; the teacher does not see it.
        precision: of the projections' products.
        processes: processes with other tokens; the means of what all leave and answer are those of one batch.
    """
    op = AttentionErrors.of(model, processes)
    with torch.no_grad(), inactive(updates), products_in(precision, model):
        run_segments(model, token_ids, op, offset=offset)
    return op.losses


def imitation_loss(
    model: DiJiangForCausalLM,
    token_ids: Tensor,
    updates: Mapping[str, LoraLinear],
    *,
    offset: int = 0,
    precision: Precision = "fp32",
    attention: AttentionOp = HYBRID,
) -> Tensor:
    """Stage 2 on [N, T] tokens: adds gradients to all trained parameters; answers the mean KL per token, nats.

    Args:
        offset: see `segments_layout`.
        precision: of the projections' products.
        attention: the student's.
    """
    with products_in(precision, model):
        with torch.no_grad(), inactive(updates):
            teacher = run_segments(model, token_ids, SoftmaxAttention())
        student = run_segments(model, token_ids, attention, offset=offset)
        loss, gradient = _divergence(student.detach(), teacher, model.head_weight)
    student.backward(gradient.to(student.dtype))
    return loss


@torch.no_grad()
def _divergence(student: Tensor, teacher: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Mean KL(teacher || student) over rows [T, D], and its gradient for the student's rows.

    Written out (softmax minus target, through the head) so that logits live for `HEAD_ROWS` rows only.
    """
    num_rows, total = len(student), student.new_zeros((), dtype=torch.float32)
    gradient = torch.empty_like(student)
    for first in range(0, num_rows, HEAD_ROWS):
        rows = slice(first, first + HEAD_ROWS)
        ours = torch.log_softmax(functional.linear(student[rows].to(head.dtype), head).float(), dim=-1)
        theirs = torch.log_softmax(functional.linear(teacher[rows].to(head.dtype), head).float(), dim=-1)
        target = theirs.exp()
        total += (target * (theirs - ours)).sum()
        gradient[rows] = ((ours.exp() - target).to(head.dtype) @ head).to(gradient.dtype) / num_rows
    return total / num_rows, gradient


def products_in(precision: Precision, model: DiJiangForCausalLM) -> torch.autocast:
    """bf16 products of projections and head; the weights, the masters, stay as they are, and so does attention."""
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
