"""What the torch operators of windows and of anchors share: queries of each branch, and the joint read-out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dijiang_model.kernel import LinearKernel
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.torch.linear import LinearResult
from dijiang_model.ops.torch.narrow import round_by_chance


@dataclass(frozen=True, slots=True)
class Queries:
    """Queries [T, G, R, d]: for the window, for the linear part and its weight, for the sinks (None without sinks)."""

    near: Tensor
    far: Tensor
    mix: Tensor
    sink: Tensor | None

    @property
    def for_sinks(self) -> Tensor:
        return self.near if self.sink is None else self.sink

    def rows(self, start: int, stop: int | None) -> "Queries":
        part = slice(start, stop)
        sink = None if self.sink is None else self.sink[part]
        return Queries(self.near[part], self.far[part], self.mix[part], sink)


def branch_queries(q: Tensor, *, kernel: LinearKernel, layout: StepLayout) -> Queries:
    """From the projected q [T, H, d]."""
    groups = (kernel.num_kv_heads, -1)
    features = kernel.attention.features
    near = layout.rotary.apply(q).unflatten(1, groups)
    sink = layout.sink_rotary.apply(q).unflatten(1, groups) if kernel.attention.sinks > 0 else None
    if not features.rotated:
        return Queries(near, kernel.far_query(q).unflatten(1, groups), q.unflatten(1, groups), sink)
    far = layout.rotary.apply(kernel.far_query(q)).unflatten(1, groups) if features.far_rank > 0 else near
    return Queries(near, far, near, sink)


def read_out(far: LinearResult, near: tuple[Tensor, Tensor] | None, q: Tensor, kernel: LinearKernel) -> Tensor:
    """Joins the linear part and the window under one denominator; [T, G, R, d]."""
    if far.denominator is None:
        return far.numerator
    if near is None:
        return far.numerator / far.denominator[..., None]
    mix = kernel.mix(q)
    near_numerator, near_denominator = near
    numerator = torch.addcmul(near_numerator, mix[..., None], far.numerator)
    denominator = torch.addcmul(near_denominator, mix, far.denominator)
    return numerator / denominator[..., None]


def store_linear(result: LinearResult, slots: Tensor, state: LayerState, *, positions: Tensor) -> None:
    is_narrow = state.linear_state.dtype != result.state.dtype
    state.linear_state[slots] = round_by_chance(result.state, positions) if is_narrow else result.state
    if state.normaliser is not None and result.normaliser is not None:
        state.normaliser[slots] = result.normaliser
