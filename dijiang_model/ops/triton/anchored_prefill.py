"""Launches the kernels of segments in layers with anchors; see `kernels.places`, `evictions`, `anchored_outputs`.

All segments of a step in eleven launches, features of the queries and of who is evicted among them; nobody waits.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor
from triton import knobs

from dijiang_model.kernel import LinearKernel
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import PrefillLayout, StepLayout, frequencies_on
from dijiang_model.ops.torch.anchors import PlaceRows
from dijiang_model.ops.torch.places import PlaceTable, place_table
from dijiang_model.ops.triton.anchors import head_tables
from dijiang_model.ops.triton.device import OPTIONS
from dijiang_model.ops.triton.kernels.anchored_outputs import anchored_outputs_kernel
from dijiang_model.ops.triton.kernels.evictions import evictions_kernel, sources_kernel
from dijiang_model.ops.triton.kernels.places import (
    candidates_kernel,
    entering_features_kernel,
    losers_kernel,
    places_kernel,
)
from dijiang_model.ops.triton.prefill import exact_tokens, query_features, states_before_chunks
from dijiang_model.ops.triton.prefill_step import PrefillStep

CANDIDATES, STEPS = 32, 64
"""Of one program that counts, and of one turn of its loop."""
COLUMNS = 16
"""Of one program that writes places."""


def prefill_anchors(
    q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
) -> Tensor:
    """The prefill segments of a step, [T, H, d]; `state.token_scores` has the scores of the step's tokens."""
    x = AnchoredStep(q, k, v, kernel=kernel, step=layout, state=state)
    own = own_rows(x)
    scores, places = candidates(x)
    found = find_evictions(scores, places, x.table, layout=x.layout)
    phi_q = query_features(x) if x.num_features > 0 else x.nothing
    phi_in, v_in = entering(x, own, places, found.losers)
    chunks = states_before_chunks(x, phi_in, v_in) if x.num_features > 0 else (x.nothing, x.nothing)
    out = outputs(x, own, places, found.times, (phi_q, phi_in, v_in, *chunks))
    write_places(x, own, scores, places, found.sources)
    return out


class AnchoredStep(PrefillStep):
    """One layer's prefill with its places, [P, B, ...]."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, step: StepLayout, state: LayerState):
        super().__init__(q, k, v, kernel=kernel, step=step, state=state)
        anchors = kernel.attention.anchors
        assert anchors is not None
        assert state.token_scores is not None
        assert state.recent_scores is not None
        self.anchors, self.table = anchors, place_table(kernel.attention, q.device)
        self.first_place, self.windows, self.limits, _ = head_tables(anchors, self.table.sinks, q.device)
        self.places = PlaceRows.of(state)
        self.token_scores, self.recent_scores = state.token_scores[step.num_decode :], state.recent_scores
        self.num_columns, self.value_width = len(self.table.columns), self.places.values.shape[-1]

    @cached_property
    def nothing(self) -> Tensor:
        """Features and states of a layer that has none."""
        return self.scratch(0, dtype=self.products.dtype)

    @property
    def segments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.layout.slots, self.layout.positions, self.layout.cu_seqlens

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values of all places, and the scales of both."""
        places = self.places
        return places.keys, places.values, places.key_scales, places.value_scales

    @property
    def row_strides(self) -> tuple[int, int, int]:
        """From one slot to the next: of keys, values, numbers."""
        places = self.places
        return places.keys.stride(0), places.values.stride(0), places.positions.stride(0)


@dataclass(frozen=True, slots=True)
class FoundEvictions:
    """Who gives way in N segments: times fp64, by segment [G, J + T]; losers int64, by segment [G, T]; sources
    [N, G, J] int64; as `ops.torch.places.SegmentEvictions`."""

    times: Tensor
    losers: Tensor
    sources: Tensor


def own_rows(x: AnchoredStep) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values of the segments' tokens as places hold them, [T, G, d] each, and the scales [T, G] of both."""
    if x.anchors.value_bits == 8:
        exact = exact_tokens(x)
        return exact.keys, exact.values, exact.key_scales, exact.value_scales
    keys = x.rotary.apply(x.k.to(x.kernel.log_decay.dtype))
    nowhere = x.layout.positions  # neither positions nor scores are asked for
    new = PlaceRows.rounded(keys, x.v.float(), nowhere, nowhere, value_bits=x.anchors.value_bits)
    return new.keys, new.values, new.key_scales, new.value_scales


def candidates(x: AnchoredStep) -> tuple[Tensor, Tensor]:
    """Shared scores fp32 and positions int32 of all candidates, by segment [G, J + T]."""
    layout, groups = x.layout, x.num_groups
    scores = x.scratch(groups * (layout.num_sequences * x.num_columns + x.num_tokens), dtype=torch.float32)
    places = torch.empty_like(scores, dtype=torch.int32)
    blocks = triton.cdiv(x.num_columns + max(layout.lengths), 4 * CANDIDATES)
    candidates_kernel[(layout.num_sequences, groups, blocks)](
        x.token_scores,
        x.places.scores,
        x.places.positions,
        x.recent_scores,
        *x.segments,
        x.first_place,
        x.windows,
        x.limits,
        scores,
        places,
        x.places.scores.stride(0),
        x.recent_scores.stride(0),
        x.num_columns,
        SINKS=x.table.sinks,
        SPAN=x.anchors.span,
        BLOCK_J=4 * CANDIDATES,
        num_warps=4,
        **OPTIONS,
    )
    return scores, places


def find_evictions(scores: Tensor, places: Tensor, table: PlaceTable, *, layout: PrefillLayout) -> FoundEvictions:
    """As `ops.torch.places.segment_evictions`, on the device, of scores fp32 and positions int32 of all candidates, by
    segment [G, J + T]."""
    num_heads, num_columns, device = len(table.window), len(table.columns), scores.device
    num_sequences, longest = layout.num_sequences, max(layout.lengths)
    _, *rules = head_tables(table.anchors, table.sinks, device)
    times = torch.empty(scores.shape, dtype=torch.float64, device=device)
    losers = torch.empty(num_heads * layout.starts[-1], dtype=torch.int64, device=device)
    sources = torch.empty((num_sequences, num_heads, num_columns), dtype=torch.int64, device=device)
    evictions_kernel[(num_sequences, num_heads, triton.cdiv(num_columns + longest, CANDIDATES))](
        *(scores, places, layout.positions, layout.cu_seqlens, *rules, times, losers, num_columns),
        SINKS=table.sinks,
        BLOCK_J=CANDIDATES,
        BLOCK_T=STEPS,
        num_warps=4,
        **OPTIONS,
    )
    sources_kernel[(num_sequences, num_heads, triton.cdiv(num_columns, CANDIDATES))](
        *(layout.positions, layout.cu_seqlens, *rules[:2], times, sources, num_columns),
        SINKS=table.sinks,
        BLOCK_J=CANDIDATES,
        num_warps=2,
        **OPTIONS,
    )
    return FoundEvictions(times, losers, sources)


def entering(x: AnchoredStep, own: tuple[Tensor, ...], places: Tensor, losers: Tensor) -> tuple[Tensor, Tensor]:
    """[T, G, K] and [T, G, d], what each token adds to the state: whoever is evicted for it."""
    kernel, features = x.kernel, x.kernel.attention.features
    if x.num_features == 0:
        return x.nothing, x.nothing
    shape, half = (x.num_tokens, x.num_groups), 0 if features.rotated else x.rotary.cos.shape[-1]
    keys, weights = (x.scratch(*shape, *last, dtype=torch.float32) for last in ((x.head_size,), ()))
    v_in = x.scratch(*shape, x.head_size, dtype=x.products.dtype)
    losers_kernel[shape](
        *own,
        *x.rows,
        places,
        losers,
        x.layout.sequence_of_token,
        *x.segments,
        x.first_place,
        frequencies_on(x.rotary.frequencies, x.q.device),
        kernel.log_decay,
        keys,
        v_in,
        weights,
        *x.row_strides,
        x.num_columns,
        D=x.head_size,
        WIDTH=x.value_width,
        HALF=half,
        BLOCK_D=x.block_d,
        num_warps=1,
        **OPTIONS,
    )
    phi_in = x.scratch(*shape, x.num_features, dtype=x.products.dtype)
    entering_features_kernel[(x.layout.num_chunks, x.num_groups)](
        keys,
        weights,
        phi_in,
        kernel.basis,
        *x.radii,
        *x.chunks,
        features.scale,
        EXP=features.normalisation == "exp",
        BLOCK_C=min(32, x.block_d),
        BLOCK_K=x.block_k,
        PRECISION=x.products.features,
        **x.feature_options,
        **x.shape,
    )
    return phi_in, v_in


def outputs(
    x: AnchoredStep, own: tuple[Tensor, ...], places: Tensor, times: Tensor, linear: tuple[Tensor, ...]
) -> Tensor:
    """[T, H, d] in the queries' dtype; `linear`: phi_q, phi_in, v_in, states and normalisers before the chunks."""
    kernel = x.kernel
    out = torch.empty(x.q.shape, dtype=x.q.dtype, device=x.q.device)
    anchored_outputs_kernel[(x.layout.num_chunks, x.num_heads, triton.cdiv(x.head_size, x.block_v))](
        x.q,
        *own,
        *linear,
        out,
        x.layout.slots,
        x.layout.positions,
        x.rotary.cos,
        x.rotary.sin,
        x.sink_rotary.cos,
        x.sink_rotary.sin,
        kernel.log_decay,
        kernel.mix_bias,
        kernel.mix_weight,
        *x.rows,
        places,
        times,
        x.first_place,
        *x.chunks,
        *x.q.stride()[:2],
        *x.row_strides,
        x.num_columns,
        R=x.num_heads // x.num_groups,
        WIDTH=x.value_width,
        HALF=x.rotary.cos.shape[-1],
        ROTATED=kernel.attention.features.rotated,
        SINKS=x.table.sinks,
        BLOCK_D=x.block_d,
        BLOCK_K=min(x.tile, x.block_k),
        BLOCK_V=x.block_v,
        BLOCK_J=16 if x.products.are_exact else 32,
        PRECISION=x.products.attention,
        EMULATED=knobs.runtime.interpret,
        num_warps=8,
        **x.shape,
    )
    return out


def write_places(x: AnchoredStep, own: tuple[Tensor, ...], scores: Tensor, places: Tensor, sources: Tensor) -> None:
    """Every place gets its token after the segments; runs after all who read them."""
    for is_anchors in (True, False):
        places_kernel[(x.layout.num_sequences, x.num_groups, triton.cdiv(x.num_columns, COLUMNS))](
            *own,
            scores,
            places,
            sources,
            x.token_scores,
            *x.segments,
            x.first_place,
            x.windows,
            x.limits,
            *x.rows,
            x.places.scores,
            x.places.positions,
            x.recent_scores,
            *x.row_strides,
            x.recent_scores.stride(0),
            x.num_columns,
            D=x.head_size,
            WIDTH=x.value_width,
            SINKS=x.table.sinks,
            SPAN=x.anchors.span,
            ANCHORS=is_anchors,
            BLOCK_J=COLUMNS,
            BLOCK_D=x.block_d,
            BLOCK_R=triton.next_power_of_2(x.anchors.num_scores),
            num_warps=4,
            **OPTIONS,
        )
