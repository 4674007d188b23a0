"""What the torch operators of windows and of anchors share: queries of each branch, and the joint read-out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dijiang_model.kernel import LinearKernel
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.torch.linear import LinearResult
from dijiang_model.ops.torch.rounding import round_stochastically


@dataclass(frozen=True, slots=True)
class Queries:
    """Queries [T, G, R, d]: for the window, for the linear part and its weight, for the sinks (None without sinks)."""

    exact: Tensor
    linear: Tensor
    mix: Tensor
    sink: Tensor | None

    @property
    def for_sinks(self) -> Tensor:
        return self.exact if self.sink is None else self.sink

    def rows(self, start: int, stop: int | None) -> "Queries":
        part = slice(start, stop)
        sink = None if self.sink is None else self.sink[part]
        return Queries(self.exact[part], self.linear[part], self.mix[part], sink)


def branch_queries(q: Tensor, *, kernel: LinearKernel, layout: StepLayout) -> Queries:
    """From the projected q [T, H, d]."""
    groups = (kernel.num_kv_heads, -1)
    features = kernel.attention.features
    exact = layout.rotary.apply(q).unflatten(1, groups)
    sink = layout.sink_rotary.apply(q).unflatten(1, groups) if kernel.attention.sinks > 0 else None
    if not features.rotated:
        return Queries(exact, kernel.far_query(q).unflatten(1, groups), q.unflatten(1, groups), sink)
    linear = layout.rotary.apply(kernel.far_query(q)).unflatten(1, groups) if features.far_rank > 0 else exact
    return Queries(exact, linear, exact, sink)


def read_out(linear: LinearResult, exact: tuple[Tensor, Tensor] | None, q: Tensor, kernel: LinearKernel) -> Tensor:
    """Joins the linear part and the window under one denominator; [T, G, R, d]."""
    if linear.denominator is None:
        return linear.numerator
    if exact is None:
        return linear.numerator / linear.denominator[..., None]
    mix = kernel.mix(q)
    exact_numerator, exact_denominator = exact
    numerator = torch.addcmul(exact_numerator, mix[..., None], linear.numerator)
    denominator = torch.addcmul(exact_denominator, mix, linear.denominator)
    return numerator / denominator[..., None]


def store_linear(result: LinearResult, slots: Tensor, state: LayerState, *, positions: Tensor) -> None:
    has_bf16_sums = state.linear_state.dtype != result.state.dtype
    state.linear_state[slots] = round_stochastically(result.state, positions) if has_bf16_sums else result.state
    if state.normaliser is not None and result.normaliser is not None:
        state.normaliser[slots] = result.normaliser
