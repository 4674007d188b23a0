"""What the teacher's attention tells before any training: how far it looks, and what a window of each size loses."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dijiang_model.config import ModelConfig
from dijiang_model.conversion.training.distill import output_weight
from dijiang_model.kernel import LinearKernel
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import AttentionOp, LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.residual import Residual
from dijiang_model.ops.training.attention import SoftmaxAttention, WindowAttention
from dijiang_model.segments import run_segments

WINDOW_CHOICES = (28, 60, 124, 252)
"""With 4 sinks each a multiple of 32 near tokens."""
ROWS = 256
MAX_HALF_LIFE_TOKENS = 2000.0
MIN_HALF_LIFE_TOKENS = 8.0


@dataclass(frozen=True, slots=True)
class LookBack:
    """Where the teacher's attention lies beyond the window, means over the calibration text.

    Attributes:
        far_mass: [L, H] share of attention beyond the window and the sinks.
        distance: [L, G] tokens that the far attention lies behind the window's edge.
        mix_bias: [L, H] with which uniform features would have that mass; see `LinearKernel.mix`.
    """

    far_mass: Tensor
    distance: Tensor
    mix_bias: Tensor

    def log_decay(self) -> Tensor:
        """[L, G]: an exponential with the mean distance as its own mean, within sensible half-lives."""
        half_life = (self.distance * math.log(2)).clamp(MIN_HALF_LIFE_TOKENS, MAX_HALF_LIFE_TOKENS)
        return -math.log(2) / half_life


def look_back(model: DiJiangForCausalLM, token_ids: Tensor) -> LookBack:
    """Measures the teacher on [N, T] tokens; T well beyond the windows."""
    layers = {id(attention.linear): layer for layer, attention in enumerate(model.attentions)}
    op = _LookBackOp(layers, [[] for _ in layers])
    with torch.no_grad():
        for segment in token_ids:
            run_segments(model, segment[None], op)
    means = [[torch.stack(values).mean(0) for values in zip(*layer, strict=True)] for layer in op.sums]
    far_mass = torch.stack([layer[0] for layer in means])
    distance = torch.stack([layer[1] / layer[2].clamp(min=1e-9) for layer in means])
    mix_bias = torch.log((far_mass / torch.stack([layer[3] for layer in means]).clamp(min=1e-9)).clamp(min=1e-6))
    return LookBack(far_mass, distance, mix_bias.clamp(-12.0, 2.0))


@dataclass(slots=True)
class _LookBackOp:
    """The teacher's attention, measured row block by row block; per layer and segment
    (far mass [H], far mass times distance [G], far mass [G], voice of a uniform far part of bias 0 [H])."""

    layers: dict[int, int]
    sums: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
    ) -> Tensor:
        near = kernel.attention
        groups = kernel.num_kv_heads
        rotated_q = layout.rotary.apply(q).unflatten(1, (groups, -1)).permute(1, 2, 0, 3)  # [G, R, T, d]
        rotated_k = layout.rotary.apply(k).transpose(0, 1)[:, None]  # [G, 1, T, d]
        length, scale = q.shape[0], q.shape[-1] ** -0.5
        token = torch.arange(length, device=q.device)
        far_mass, voice = q.new_zeros(rotated_q.shape[:2]), q.new_zeros(rotated_q.shape[:2])  # [G, R]
        moment = q.new_zeros(groups)
        for first in range(0, length, ROWS):
            rows = token[first : first + ROWS, None]
            scores = (rotated_q[:, :, first : first + ROWS] @ rotated_k.transpose(-1, -2)) * scale
            scores = scores.masked_fill(token > rows, -torch.inf)
            if kernel.teacher_window > 0:
                scores = scores.masked_fill(token <= rows - kernel.teacher_window, -torch.inf)
            is_far = (token <= rows - near.window) & (token >= near.sinks)
            probability = scores.softmax(-1)
            far = probability * is_far
            # Near scores relative to the largest near one, as in the joint denominator.
            visible = scores.masked_fill(is_far, -torch.inf)
            shifted = (scores.logsumexp(-1) - visible.amax(-1)).exp()
            far_mass = far_mass + far.sum(-1).sum(-1)
            moment = moment + (far * (rows - near.window - token).clamp(min=0)).sum((1, 2, 3))
            voice = voice + (is_far.sum(-1).clamp(max=MAX_HALF_LIFE_TOKENS) / shifted).sum(-1)
        self.sums[self.layers[id(kernel)]].append(
            (far_mass.flatten() / length, moment / length, far_mass.sum(1) / length, voice.flatten() / length)
        )
        return SoftmaxAttention()(q, k, v, kernel=kernel, layout=layout, state=state)


def window_losses(model: DiJiangForCausalLM, token_ids: Tensor, windows: Sequence[int], *, sinks: int) -> Tensor:
    """[L, len(windows)]: squared error that a window alone leaves in a layer's output, over its stream's square.

    Args:
        token_ids: [N, T] on the model's device; the second half of each segment counts.
    """
    losses = torch.zeros(model.config.num_layers, len(windows))
    with torch.no_grad():
        for segment in token_ids:
            outputs: list[list[Tensor]] = []
            with _inputs_of_blocks(model) as streams:
                run_segments(model, segment[None], _Compared(windows, sinks, outputs))
            half = len(segment) // 2
            for layer, attention in enumerate(model.attentions):
                energy = streams[layer][half:].square().sum()
                for place, error in enumerate(outputs[layer]):
                    losses[layer, place] += float((error[half:] @ output_weight(attention).T).square().sum() / energy)
    return losses / len(token_ids)


@contextmanager
def _inputs_of_blocks(model: DiJiangForCausalLM) -> Iterator[list[Tensor]]:
    """Yields a list that gets each block's input as it runs."""
    seen: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Residual, ...]) -> None:
        seen.append(inputs[0].value)

    hooks = [block.register_forward_pre_hook(note) for block in model.blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True, slots=True)
class _Compared:
    """The teacher's attention; notes the error of each window, [T, H * d], layer by layer."""

    windows: Sequence[int]
    sinks: int
    errors: list[list[Tensor]]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
    ) -> Tensor:
        def run(op: AttentionOp) -> Tensor:
            return op(q, k, v, kernel=kernel, layout=layout, state=state)

        target = run(SoftmaxAttention())
        self.errors.append([(run(WindowAttention(w, self.sinks)) - target).flatten(1) for w in self.windows])
        return target


def allocate_windows(losses: Tensor, windows: Sequence[int], *, mean_window: int) -> list[int]:
    """A window for each layer that keeps their mean within `mean_window`: the most loss saved per token first.

    Args:
        losses: [L, len(windows)], see `window_losses`.
        windows: ascending, the first within the mean.
    """
    assert windows[0] <= mean_window
    num_layers = len(losses)
    place = [0] * num_layers
    spare = mean_window * num_layers - windows[0] * num_layers
    while True:
        gains = []
        for layer in range(num_layers):
            for target in range(place[layer] + 1, len(windows)):
                cost = windows[target] - windows[place[layer]]
                if cost <= spare:
                    saved = float(losses[layer, place[layer]] - losses[layer, target])
                    gains.append((saved / cost, layer, target, cost))
        if not gains or max(gains)[0] <= 0:
            return [windows[p] for p in place]
        _, layer, target, cost = max(gains)
        place[layer] = target
        spare -= cost


def with_windows(config: ModelConfig, windows: Sequence[int]) -> ModelConfig:
    """The network with another window in each layer."""
    layers = [replace(layer, window=window) for layer, window in zip(config.layers, windows, strict=True)]
    return replace(config, layers=tuple(layers))
