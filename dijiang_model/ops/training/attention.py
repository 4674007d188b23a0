"""Attention for training and evaluation: whole segments from an empty state, differentiable, nothing written in place.

`HybridAttention` computes what `TorchAttention` computes for a segment that starts at position 0, from the same
chunked operators; its memory is linear in length. `SoftmaxAttention` is the teacher: full causal softmax through
the same blocks, so that teacher and student share their weights. `WindowAttention` is the training-free baseline.
All three take only prefill segments that start at position 0.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from dijiang_model.kernel import LinearKernel
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import PrefillLayout, StepLayout
from dijiang_model.ops.torch.branches import Queries
from dijiang_model.ops.torch.linear import LinearResult, chunked
from dijiang_model.ops.torch.window import prefill_window
from dijiang_model.ops.training.anchors import SegmentPlaces, exact_places, linear_places, rounded

NO_STATE = LayerState(torch.empty(0), None, None, None)
"""Stands for a layer's state where there is none to read or write."""


@dataclass(frozen=True, slots=True)
class SoftmaxAttention:
    """The unconverted attention: every token sees all before it, or the teacher's own window."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
    ) -> Tensor:
        """See `ops.AttentionOp`; `state` is not touched."""
        prefill = _from_scratch(layout)
        q, k = layout.rotary.apply(q), layout.rotary.apply(k)
        segments = zip(prefill.starts, prefill.lengths, strict=False)
        # On a CPU narrow products are slower here than fp32.
        with torch.autocast("cpu", enabled=False):
            rows = (q, k, v.to(q.dtype))
            parts = [tuple(x[first : first + length] for x in rows) for first, length in segments]
            return torch.cat([_causal(*part, window=kernel.teacher_window) for part in parts])


@dataclass(frozen=True, slots=True)
class WindowAttention:
    """Exact softmax over the last `window` tokens and the first `sinks`, and nothing beyond.

    Attributes:
        window, sinks: None: the layer's own.
    """

    window: int | None = None
    sinks: int | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
    ) -> Tensor:
        """See `ops.AttentionOp`; `state` is not touched."""
        rotated = _Rotated.of(q, k, v, kernel=kernel, layout=layout)
        window = kernel.attention.window if self.window is None else self.window
        sinks = kernel.attention.sinks if self.sinks is None else self.sinks
        numerator, denominator = _exact(rotated, layout, window=window, sinks=sinks)
        return (numerator / denominator[..., None]).flatten(1, 2)


@dataclass(frozen=True, slots=True)
class HybridAttention:
    """The layer's own attention, hybrid or pure.

    Attributes:
        window: replaces the window of layers that have one; 1 leaves everything but the token itself and the
            sinks to the linear part. None: the layer's own, or its places where it has anchors.
    """

    window: int | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
    ) -> Tensor:
        """See `ops.AttentionOp`; `state` is not touched. Computes in the kernel's dtype under any autocast."""
        assert kernel.attention.read_out == "denominator"
        assert kernel.attention.decay == "static"
        with torch.autocast(q.device.type, enabled=False):
            return self._answer(q, k, v, kernel=kernel, layout=layout, token_scores=state.token_scores)

    def _answer(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, token_scores: Tensor | None
    ) -> Tensor:
        rotated = _Rotated.of(q, k, v, kernel=kernel, layout=layout)
        if kernel.attention.anchors is not None and self.window is None:
            places = _places(token_scores, layout, kernel)
            rotated = rotated.in_places(layout, kernel)
            exact = _held(rotated, layout, kernel=kernel, places=places)
            return _joined(rotated, exact, layout, kernel=kernel, window=0, places=places)
        if kernel.attention.window == 0:
            linear = _linear(rotated, layout, kernel=kernel, window=0)
            assert linear.denominator is not None
            return (linear.numerator / linear.denominator[..., None]).flatten(1, 2)
        window = kernel.attention.window if self.window is None else self.window
        exact = _exact(rotated, layout, window=window, sinks=kernel.attention.sinks)
        return _joined(rotated, exact, layout, kernel=kernel, window=window)


@dataclass(frozen=True, slots=True)
class RecordedAttention:
    """What `HybridAttention` needs of one layer and segment, with the window's share computed once.

    For training a kernel on the same text again and again: only the linear part is computed anew.

    Attributes:
        q: [T, H, d] and k, v: [T, G, d], as projected.
        exact, exact_denominator: [T, G, R, d] and [T, G, R].
        target: [T, H, d], what full softmax attention answers.
        places: who is held, of a layer with anchors.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    exact: Tensor
    exact_denominator: Tensor
    target: Tensor
    places: SegmentPlaces | None = None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        kernel: LinearKernel,
        layout: StepLayout,
        token_scores: Tensor | None = None,
    ) -> "RecordedAttention":
        """Records a layer whose own window is >= 1; one with anchors needs the scores of its tokens."""
        rotated = _Rotated.of(q, k, v, kernel=kernel, layout=layout)
        places = None
        if kernel.attention.anchors is None:
            exact = _exact(rotated, layout, window=kernel.attention.window, sinks=kernel.attention.sinks)
        else:
            places = _places(token_scores, layout, kernel)
            exact = _held(rotated.in_places(layout, kernel), layout, kernel=kernel, places=places)
        target = SoftmaxAttention()(q, k, v, kernel=kernel, layout=layout, state=NO_STATE)
        return cls(q, k, v, *exact, target)

    @property
    def window_answer(self) -> Tensor:
        """[T, H, d], the window alone."""
        return (self.exact / self.exact_denominator[..., None]).flatten(1, 2)

    def answer(self, *, kernel: LinearKernel, layout: StepLayout) -> Tensor:
        """[T, H, d], as `HybridAttention` answers; with gradients."""
        rotated = _Rotated.of(self.q, self.k, self.v, kernel=kernel, layout=layout)
        if self.places is not None:
            rotated = rotated.in_places(layout, kernel)
        exact, window = (self.exact, self.exact_denominator), kernel.attention.window
        return _joined(rotated, exact, layout, kernel=kernel, window=window, places=self.places)


@dataclass(frozen=True, slots=True)
class _Rotated:
    """q, linear_q, mix_q (for the weight of the linear part) and q_sink [T, G, R, d]; k, linear_k and v [T, G, d]."""

    q: Tensor
    linear_q: Tensor
    mix_q: Tensor
    q_sink: Tensor
    k: Tensor
    linear_k: Tensor
    v: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout) -> "_Rotated":
        groups = (kernel.num_kv_heads, -1)
        dtype = kernel.log_decay.dtype
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        features = kernel.attention.features
        rotated, rotated_k = layout.rotary.apply(q).unflatten(1, groups), layout.rotary.apply(k)
        capped = rotated if layout.sink_rotary is layout.rotary else layout.sink_rotary.apply(q).unflatten(1, groups)
        if not features.rotated:
            linear, mix = kernel.far_query(q).unflatten(1, groups), q.unflatten(1, groups)
            return cls(rotated, linear, mix, capped, rotated_k, k, v)
        linear = rotated
        if features.far_rank > 0:
            linear = layout.rotary.apply(kernel.far_query(q)).unflatten(1, groups)
        return cls(rotated, linear, rotated, capped, rotated_k, rotated_k, v)

    def in_places(self, layout: StepLayout, kernel: LinearKernel) -> "_Rotated":
        """With keys and values as places hold them, and as the features read those."""
        anchors = kernel.attention.anchors
        assert anchors is not None
        k, v = rounded(self.k), rounded(self.v, anchors.value_bits)
        return replace(self, k=k, linear_k=k if kernel.attention.features.rotated else layout.rotary.undo(k), v=v)


def _joined(
    x: _Rotated,
    exact: tuple[Tensor, Tensor],
    layout: StepLayout,
    *,
    kernel: LinearKernel,
    window: int,
    places: SegmentPlaces | None = None,
) -> Tensor:
    """What is held and the linear part under one denominator; [T, H, d]."""
    if places is None:
        linear = _linear(x, layout, kernel=kernel, window=window)
    else:
        prefill = _from_scratch(layout)
        linear = linear_places(kernel.phi(x.linear_q), x.linear_k, x.v, places=places, kernel=kernel, layout=prefill)
    assert linear.denominator is not None
    mix = kernel.mix(x.mix_q)
    numerator = torch.addcmul(exact[0], mix[..., None], linear.numerator)
    denominator = torch.addcmul(exact[1], mix, linear.denominator)
    return (numerator / denominator[..., None]).flatten(1, 2)


def _places(token_scores: Tensor | None, layout: StepLayout, kernel: LinearKernel) -> SegmentPlaces:
    assert token_scores is not None, "a layer with anchors scores its tokens"
    return SegmentPlaces.of(token_scores, _from_scratch(layout), kernel)


def _held(x: _Rotated, layout: StepLayout, *, kernel: LinearKernel, places: SegmentPlaces) -> tuple[Tensor, Tensor]:
    """Numerator [T, G, R, d] and denominator [T, G, R] of what the places hold."""
    queries = Queries(exact=x.q, linear=x.linear_q, mix=x.mix_q, sink=x.q_sink)
    prefill, sinks, scale = _from_scratch(layout), kernel.attention.sinks, kernel.head_size**-0.5
    return exact_places(queries, x.k, x.v, places=places, layout=prefill, sinks=sinks, scale=scale)


def _from_scratch(layout: StepLayout) -> PrefillLayout:
    assert layout.num_decode == 0, "training ops take whole segments only"
    assert layout.prefill is not None
    return layout.prefill


def _causal(q: Tensor, k: Tensor, v: Tensor, *, window: int = 0) -> Tensor:
    """One segment: q [T, H, d], k and v [T, G, d] -> [T, H, d]; memory linear in T where the window holds all of it.

    Args:
        window: tokens that each sees, itself among them; 0: all before it.
    """
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    visible = None
    if 0 < window < len(q):
        token = torch.arange(len(q), device=q.device)
        visible = (token <= token[:, None]) & (token > token[:, None] - window)
    attended = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, is_causal=visible is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return attended[0].transpose(0, 1)


def _exact(x: _Rotated, layout: StepLayout, *, window: int, sinks: int) -> tuple[Tensor, Tensor]:
    """Numerator [T, G, R, d] and denominator [T, G, R] of the exact tokens."""
    prefill = _from_scratch(layout)
    exact = prefill.window(window=window, sinks=sinks)
    # Segments shorter than the sinks repeat their last token there; it is masked as yet unseen.
    offsets = torch.minimum(torch.arange(sinks, device=x.k.device)[None, :], prefill.sequence_length[:, None] - 1)
    sink_rows = prefill.sequence_start[:, None] + offsets  # [N, Z]
    scale = x.q.shape[-1] ** -0.5
    return prefill_window(
        x.q * scale,
        x.q_sink * scale,
        stream_keys=_after_empty_rings(x.k, prefill, window),
        stream_values=_after_empty_rings(x.v, prefill, window),
        sink_keys=x.k[sink_rows].transpose(1, 2),
        sink_values=x.v[sink_rows].transpose(1, 2),
        layout=prefill,
        window=exact,
    )


def _after_empty_rings(x: Tensor, prefill: PrefillLayout, window: int) -> Tensor:
    """[T, G, d] -> the extended streams [N * W + T, G, d] of segments that nothing precedes."""
    return torch.cat([x.new_zeros((prefill.num_sequences * window, *x.shape[1:])), x])


def _linear(x: _Rotated, layout: StepLayout, *, kernel: LinearKernel, window: int) -> LinearResult:
    """The linear part over all tokens that left the window (over all, if `window` is 0)."""
    prefill = _from_scratch(layout)
    k, v = x.linear_k, x.v
    if window > 0:
        exact = prefill.window(window=window, sinks=kernel.attention.sinks)
        k = _after_empty_rings(k, prefill, window)[exact.leaving]
        v = _after_empty_rings(v, prefill, window)[exact.leaving]
    phi_q, phi_k = kernel.phi(x.linear_q), kernel.phi(k[:, :, None, :]).squeeze(2)
    if window > 0:
        late = (kernel.log_decay * window).exp()
        phi_k = phi_k * (exact.leaves * late)[..., None]
    shape = (prefill.num_sequences, *phi_k.shape[1:])
    return chunked(
        phi_q,
        phi_k,
        v,
        log_decay=kernel.log_decay,
        state=phi_k.new_zeros((*shape, v.shape[-1])),
        normaliser=phi_k.new_zeros(shape),
        layout=prefill,
    )
