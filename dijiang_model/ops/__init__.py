"""The attention operators behind one small protocol, chosen once at load.

`TorchAttention` runs everywhere; a device with its own kernels implements the same call.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dijiang_model.kernel import LinearKernel
from dijiang_model.ops.layout import StepLayout


@dataclass(frozen=True, slots=True)
class LayerState:
    """Views of one layer's state over all slots; written in place.

    Attributes:
        linear_state: [P, G, K, V], S.
        normaliser: [P, G, K], z; None for a read-out without denominator.
        near_keys, near_values: of the exact part, named as in saved states; [P, G, Z + W, d], sinks first, then the
            ring (position t in ring row t mod W); keys are rotated. None without a window. With anchors [P, B, d] int8:
            the places of all heads, one head after another, each with its sinks, its ring and its anchors
            (`ops.torch.places`).
        near_key_scales, near_value_scales: [P, G, Z + W] ([P, B]) fp32, of exact rows in int8; else None.
        near_positions, near_scores: [P, B] int32 and fp32, position and shared score of the token in each place;
            None without anchors.
        recent_scores: [P, G, 2 span + 1] fp32, the last scores, that of position t in entry t mod (2 span + 1).
        token_scores: [T, G], the scores of the step's tokens; None without anchors.
    """

    linear_state: Tensor
    normaliser: Tensor | None
    near_keys: Tensor | None
    near_values: Tensor | None
    near_key_scales: Tensor | None = None
    near_value_scales: Tensor | None = None
    near_positions: Tensor | None = None
    near_scores: Tensor | None = None
    recent_scores: Tensor | None = None
    token_scores: Tensor | None = None


class AttentionOp(Protocol):
    """One layer's attention between its two projections."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
    ) -> Tensor:
        """Rotates, attends, and moves the states of the step's sequences on.

        Args:
            q: [T, H, d], k and v: [T, G, d], as projected.

        Returns:
            [T, H, d]: normalised with the `denominator` read-out, raw sums with `group_norm`.
        """
        ...
