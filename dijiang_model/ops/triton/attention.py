"""The attention of one layer in Triton kernels: see `ops.AttentionOp`."""

import torch
from torch import Tensor

from dijiang_model.kernel import LinearKernel
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import Rotary, StepLayout
from dijiang_model.ops.torch.anchors import AnchorKernels, anchored_attention
from dijiang_model.ops.torch.attention import TorchAttention
from dijiang_model.ops.triton.anchored_prefill import prefill_anchors
from dijiang_model.ops.triton.anchors import decode_anchors
from dijiang_model.ops.triton.decode import decode
from dijiang_model.ops.triton.device import on_device_of
from dijiang_model.ops.triton.prefill import prefill
from dijiang_model.rotary import Frequencies

STATE_DTYPES = (torch.float32, torch.bfloat16)


class TritonAttention:
    """Decode rows in one launch, prefill segments in five, with anchors in eleven; sums and decays in fp32, products in
    the weights' dtype.

    Decode rows of layers with anchors that have values of 4 bits or no linear part, and layers without anchors that
    have fewer than 16 features are computed by torch operations. None of these makes the host wait for the device.

    Fp64 models are not for it (`dijiang_model.ops.attention_for` gives them torch's).
    """

    def __init__(self) -> None:
        self._late: dict[tuple[torch.device, Frequencies, int], tuple[Tensor, Tensor]] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
    ) -> Tensor:
        if state.linear_state.dtype not in STATE_DTYPES:
            raise ValueError(f"on CUDA states are kept in float32 or bfloat16, not {state.linear_state.dtype}")
        assert not (torch.is_grad_enabled() and q.requires_grad), "the kernels know no gradients"
        with on_device_of(q):  # Triton launches on the current device, wherever its arguments are
            return self._answer(q, k, v, kernel=kernel, layout=layout, state=state)

    def _answer(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
    ) -> Tensor:
        anchors = kernel.attention.anchors
        if anchors is not None:
            is_known = anchors.value_bits == 8 and kernel.num_features > 0
            kernels = AnchorKernels(decode_anchors if is_known else None, prefill_anchors)
            return anchored_attention(q, k, v, kernel=kernel, layout=layout, state=state, kernels=kernels)
        if kernel.num_features < 16:
            return TorchAttention()(q, k, v, kernel=kernel, layout=layout, state=state)
        split = layout.num_decode
        # Raw sums go through a norm before they are rounded.
        dtype = q.dtype if kernel.attention.read_out == "denominator" else torch.float32
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
        late = self._late_angles(kernel, layout.rotary)
        if split > 0:
            rows = slice(0, split)
            decode(q[rows], k[rows], v[rows], kernel=kernel, layout=layout, state=state, out=out[rows], late=late)
        if layout.prefill is not None:
            rows = slice(split, None)
            prefill(q[rows], k[rows], v[rows], kernel=kernel, step=layout, state=state, out=out[rows], late=late)
        return out

    def _late_angles(self, kernel: LinearKernel, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Cosines and sines of as many positions as the layer's window has, [d_rotary / 2] each; made once."""
        window = kernel.attention.window
        key = (rotary.cos.device, rotary.frequencies, window)
        if key not in self._late:
            position = torch.full((1,), window, device=rotary.cos.device)
            angles = Rotary.at(position, frequencies=rotary.frequencies, dtype=torch.float32)
            self._late[key] = (angles.cos[0], angles.sin[0])
        return self._late[key]
