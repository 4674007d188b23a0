"""One layer's prefill as its kernels see it: how products are computed, the tensors, the exact rows of its tokens."""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from dijiang_model.kernel import LinearKernel
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import CHUNK_TOKENS, PrefillLayout, StepLayout
from dijiang_model.ops.triton.device import OPTIONS


@dataclass(frozen=True, slots=True)
class Products:
    """How matrix products are computed.

    Attributes:
        dtype: of the operands of attention: bf16 for bf16 models, else fp32.
        attention: input precision of products of fp32 operands.
        features: the same where queries and keys meet the basis; an error there goes through an exponential.
    """

    dtype: torch.dtype
    attention: str
    features: str

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Products":
        """For a model's dtype: fp32 models are computed in fp32, narrower ones by the matrix units."""
        if dtype == torch.bfloat16:
            return cls(torch.bfloat16, "tf32", "tf32x3")
        if dtype == torch.float16:  # features of the `exp` kind pass its range
            return cls(torch.float32, "tf32", "tf32x3")
        return cls(torch.float32, "ieee", "ieee")

    @property
    def are_exact(self) -> bool:
        """Whether attention's are exact in fp32: multiply-adds without matrix units, which keep whole rows and columns
        of their operands in registers and spill kilobytes a thread unless blocks are narrow.
        """
        return self.attention == "ieee"


@dataclass(frozen=True, slots=True)
class ExactTokens:
    """The segments' own keys and values as the exact rows will hold them.

    Attributes:
        keys, values: [T, G, d], keys rotated; without a window as they were projected, and keys are not read.
        key_scales, value_scales: [T, G] fp32 where exact rows are int8; else whatever: not read.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor
    value_scales: Tensor


class PrefillStep:
    """One layer's prefill: its tensors, and the arguments that several kernels share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, step: StepLayout, state: LayerState):
        assert step.prefill is not None
        self.q, self.k, self.v, self.kernel, self.state = q, k, v, kernel, state
        self.layout: PrefillLayout = step.prefill
        self.rotary = step.rotary.rows(step.num_decode, len(step.positions))
        self.sink_rotary = step.sink_rotary.rows(step.num_decode, len(step.positions))
        self.products = Products.of(q.dtype)
        self.num_tokens, self.num_heads, self.head_size = q.shape
        self.num_groups, self.num_features = kernel.num_kv_heads, kernel.num_features
        # Matrix units take 16 numbers at least; smaller heads are filled up with zeros.
        self.block_d = max(16, triton.next_power_of_2(self.head_size))
        self.block_k = max(16, triton.next_power_of_2(self.num_features))
        self.tile = 32 if self.products.are_exact else 64  # of a state, rows and columns at most
        is_cut = self.products.are_exact or self.block_d > 128
        self.block_v = min(self.tile, self.block_d) if is_cut else self.block_d
        # Of those that compute features: two tiles of the basis under way, for two programs to fit.
        has_much = self.block_k >= 128 or self.has_window
        self.feature_options = {"num_warps": 8 if has_much else 4, "num_stages": 2}

    @property
    def has_window(self) -> bool:
        return self.kernel.attention.window > 0

    @property
    def is_int8(self) -> bool:
        """Whether exact rows are in int8."""
        return self.state.near_key_scales is not None

    @property
    def absent(self) -> Tensor:
        """Stands for tensors that this layer does not have: never read. fp32, as scales would be."""
        return self.kernel.log_decay

    @property
    def ring(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Near keys and values over all slots, and their scales."""
        state, absent = self.state, self.absent
        return (
            absent if state.near_keys is None else state.near_keys,
            absent if state.near_values is None else state.near_values,
            absent if state.near_key_scales is None else state.near_key_scales,
            absent if state.near_value_scales is None else state.near_value_scales,
        )

    @property
    def ring_strides(self) -> tuple[int, int]:
        """From one slot to the next, in elements: of exact rows, of their scales."""
        near_keys, _, key_scales, _ = self.ring
        return near_keys.stride(0), key_scales.stride(0)

    @property
    def has_table(self) -> bool:
        return self.kernel.attention.decay == "table"

    @cached_property
    def num_entries(self) -> int:
        return self.kernel.table_write.shape[0] if self.has_table else 0

    def scratch(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    @property
    def radii(self) -> tuple[Tensor, Tensor]:
        """Nodes and log weights."""
        kernel = self.kernel
        return (kernel.ones, kernel.zeros) if kernel.is_whole_projection else (kernel.nodes, kernel.log_weights)

    @property
    def chunks(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.layout.chunk_sequence, self.layout.chunk_offset, self.layout.cu_seqlens

    @property
    def shape(self) -> dict[str, int]:
        return {"D": self.head_size, "K": self.num_features, "C": CHUNK_TOKENS, **OPTIONS}
