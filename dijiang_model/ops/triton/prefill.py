"""Launches the prefill kernels; see `kernels.prefill_features`, `prefill_states`, `prefill_outputs`.

Segments of any lengths, each from the state in its slot, which is moved on in place. Keys, values and states of
grouped heads are never repeated. Scratch memory grows with the step's tokens: features, and a state for every 64.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor
from triton import knobs

from dijiang_model.kernel import LinearKernel
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import CHUNK_TOKENS, PrefillLayout, StepLayout
from dijiang_model.ops.triton.decode import OPTIONS
from dijiang_model.ops.triton.kernels.prefill_features import entering_kernel, keys_kernel, queries_kernel
from dijiang_model.ops.triton.kernels.prefill_outputs import outputs_kernel
from dijiang_model.ops.triton.kernels.prefill_states import near_rows_kernel, states_kernel


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


class PrefillStep:
    """One layer's prefill: its tensors, and the arguments that several kernels share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, step: StepLayout, state: LayerState):
        assert step.prefill is not None
        assert state.near_values is None or state.near_values.dtype == v.dtype
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


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: LinearKernel,
    step: StepLayout,
    state: LayerState,
    out: Tensor,
    late: tuple[Tensor, Tensor],
) -> None:
    """The prefill segments of a step: see `ops.AttentionOp`.

    Args:
        q, k, v: of the segments alone; the last dimension contiguous.
        out: [T, H, d], contiguous; written.
        late: cosines and sines of as many positions as the window has; read where features see no rotation.
    """
    if state.near_values is not None:  # as a later step will find them
        v = v.to(state.near_values.dtype)
    x = PrefillStep(q, k, v, kernel=kernel, step=step, state=state)
    rotated = rotated_keys(x)
    phi_q = query_features(x)
    phi_in, v_in = entering(x, rotated, late)
    chunk_states, chunk_normalisers = states_before_chunks(x, phi_in, v_in)
    chunk_outputs(x, rotated, phi_q, phi_in, v_in, chunk_states, chunk_normalisers, out)
    if x.has_window:
        write_near_rows(x, rotated)


def rotated_keys(x: PrefillStep) -> Tensor:
    """[T, G, d] as the ring will hold them; without a window nobody asks for them."""
    if x.state.near_keys is None:
        return x.k
    rotated = x.scratch(x.num_tokens, x.num_groups, x.head_size, dtype=x.state.near_keys.dtype)
    keys_kernel[(x.layout.num_chunks, x.num_groups)](
        x.k,
        rotated,
        x.rotary.cos,
        x.rotary.sin,
        *x.chunks,
        *x.k.stride()[:2],
        D=x.head_size,
        HALF=x.rotary.cos.shape[-1],
        C=CHUNK_TOKENS,
        BLOCK_D=x.block_d,
        **OPTIONS,
    )
    return rotated


def query_features(x: PrefillStep) -> Tensor:
    """[T, H, K]."""
    kernel, features = x.kernel, x.kernel.attention.features
    q = kernel.far_query(x.q.to(kernel.log_decay.dtype)) if features.far_rank > 0 else x.q
    phi_q = x.scratch(x.num_tokens, x.num_heads, x.num_features, dtype=x.products.dtype)
    queries_kernel[(x.layout.num_chunks, x.num_heads)](
        q,
        phi_q,
        x.layout.positions,
        x.rotary.cos,
        x.rotary.sin,
        kernel.basis,
        *x.radii,
        kernel.table_read if x.has_table else phi_q,
        *x.chunks,
        *q.stride()[:2],
        x.num_entries,
        features.scale,
        R=x.num_heads // x.num_groups,
        HALF=x.rotary.cos.shape[-1] if features.rotated else 0,
        EXP=features.normalisation == "exp",
        TABLE=x.has_table,
        BLOCK_C=min(32, x.block_d),
        BLOCK_K=x.block_k,
        PRECISION=x.products.features,
        **x.feature_options,
        **x.shape,
    )
    return phi_q


def entering(x: PrefillStep, rotated: Tensor, late: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """[T, G, K] and [T, G, d], what each token adds to the state; values keep their place without a window."""
    kernel, config = x.kernel, x.kernel.attention
    phi_in = x.scratch(x.num_tokens, x.num_groups, x.num_features, dtype=x.products.dtype)
    v_in = torch.empty(x.v.shape, dtype=x.v.dtype, device=x.v.device) if x.has_window else x.v
    near_keys = phi_in if x.state.near_keys is None else x.state.near_keys
    entering_kernel[(x.layout.num_chunks, x.num_groups)](
        x.k,
        rotated,
        x.v,
        phi_in,
        v_in,
        x.layout.slots,
        x.layout.positions,
        x.rotary.cos,
        x.rotary.sin,
        *late,
        kernel.basis,
        *x.radii,
        kernel.log_decay,
        kernel.table_write if x.has_table else phi_in,
        near_keys,
        phi_in if x.state.near_values is None else x.state.near_values,
        *x.chunks,
        *x.k.stride()[:2],
        *x.v.stride()[:2],
        near_keys.stride(0),
        x.num_entries,
        config.features.scale,
        HALF=x.rotary.cos.shape[-1],
        ROTATED=config.features.rotated,
        WINDOW=config.window,
        SINKS=config.sinks,
        EXP=config.features.normalisation == "exp",
        TABLE=x.has_table,
        BLOCK_C=min(32, x.block_d),
        BLOCK_D=x.block_d,
        BLOCK_K=x.block_k,
        PRECISION=x.products.features,
        **x.feature_options,
        **x.shape,
    )
    return phi_in, v_in


def states_before_chunks(x: PrefillStep, phi_in: Tensor, v_in: Tensor) -> tuple[Tensor, Tensor]:
    """[M, G, K, d] and [M, G, K], the state before each chunk; moves the slots on."""
    kernel, state = x.kernel, x.state.linear_state
    num_chunks, block_k, block_v = x.layout.num_chunks, min(x.tile, x.block_k), min(x.tile, x.block_d)
    chunk_states = x.scratch(num_chunks, x.num_groups, x.num_features, x.head_size, dtype=x.products.dtype)
    chunk_normalisers = x.scratch(num_chunks, x.num_groups, x.num_features, dtype=torch.float32)
    normaliser = chunk_normalisers if x.state.normaliser is None else x.state.normaliser
    tiles_k, tiles_v = triton.cdiv(x.num_features, block_k), triton.cdiv(x.head_size, block_v)
    states_kernel[(x.layout.num_sequences, x.num_groups, tiles_k * tiles_v)](
        phi_in,
        v_in,
        chunk_states,
        chunk_normalisers,
        state,
        normaliser,
        x.layout.slots,
        x.layout.positions,
        kernel.log_decay,
        kernel.table_log_decay if x.has_table else phi_in,
        x.layout.cu_seqlens,
        x.layout.first_chunks,
        *v_in.stride()[:2],
        state.stride(0),
        normaliser.stride(0),
        x.num_entries,
        TABLE=x.has_table,
        DENOMINATOR=x.state.normaliser is not None,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        TILES_V=tiles_v,
        PRECISION=x.products.attention,
        EMULATED=knobs.runtime.interpret,
        **x.shape,
    )
    return chunk_states, chunk_normalisers


def chunk_outputs(
    x: PrefillStep,
    rotated: Tensor,
    phi_q: Tensor,
    phi_in: Tensor,
    v_in: Tensor,
    chunk_states: Tensor,
    chunk_normalisers: Tensor,
    out: Tensor,
) -> None:
    kernel, config = x.kernel, x.kernel.attention
    near_keys = phi_in if x.state.near_keys is None else x.state.near_keys
    outputs_kernel[(x.layout.num_chunks, x.num_heads, triton.cdiv(x.head_size, x.block_v))](
        x.q,
        rotated,
        x.v,
        phi_q,
        phi_in,
        v_in,
        chunk_states,
        chunk_normalisers,
        out,
        x.layout.slots,
        x.layout.positions,
        x.rotary.cos,
        x.rotary.sin,
        x.sink_rotary.cos,
        x.sink_rotary.sin,
        kernel.log_decay,
        kernel.table_log_decay if x.has_table else phi_in,
        kernel.mix_bias if x.has_window else phi_in,
        kernel.mix_weight if x.has_window else phi_in,
        near_keys,
        phi_in if x.state.near_values is None else x.state.near_values,
        *x.chunks,
        *x.q.stride()[:2],
        *x.v.stride()[:2],
        *v_in.stride()[:2],
        near_keys.stride(0),
        x.num_entries,
        R=x.num_heads // x.num_groups,
        HALF=x.rotary.cos.shape[-1],
        ROTATED=config.features.rotated,
        WINDOW=config.window,
        SINKS=config.sinks,
        TABLE=x.has_table,
        DENOMINATOR=config.read_out == "denominator",
        BLOCK_D=x.block_d,
        BLOCK_K=min(x.tile, x.block_k),
        BLOCK_V=x.block_v,
        BLOCK_J=16 if x.products.are_exact else 64 if x.block_d <= 64 else 32,
        PRECISION=x.products.attention,
        EMULATED=knobs.runtime.interpret,
        num_warps=8 if x.block_d > 64 or x.has_window else 4,
        **x.shape,
    )


def write_near_rows(x: PrefillStep, rotated: Tensor) -> None:
    near_keys, near_values = x.state.near_keys, x.state.near_values
    assert near_keys is not None
    near_rows_kernel[(x.layout.num_sequences, x.num_groups)](
        rotated,
        x.v,
        near_keys,
        near_values,
        x.layout.slots,
        x.layout.positions,
        x.layout.cu_seqlens,
        *x.v.stride()[:2],
        near_keys.stride(0),
        D=x.head_size,
        WINDOW=x.kernel.attention.window,
        SINKS=x.kernel.attention.sinks,
        BLOCK_J=16,
        BLOCK_D=x.block_d,
        **OPTIONS,
    )
