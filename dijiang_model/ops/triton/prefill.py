"""Launches the prefill kernels; see `kernels.prefill_features`, `prefill_states`, `prefill_outputs`.

Segments of any lengths, each from the state in its slot, which is moved on in place. Keys, values and states of
grouped heads are never repeated. Scratch memory grows with the step's tokens: features, and a state for every 64.
"""

import torch
import triton
from torch import Tensor
from triton import knobs

from dijiang_model.kernel import LinearKernel
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import CHUNK_TOKENS, StepLayout
from dijiang_model.ops.triton.device import OPTIONS
from dijiang_model.ops.triton.kernels.prefill_features import entering_kernel, keys_kernel, queries_kernel
from dijiang_model.ops.triton.kernels.prefill_outputs import outputs_kernel
from dijiang_model.ops.triton.kernels.prefill_states import exact_rows_kernel, states_kernel
from dijiang_model.ops.triton.prefill_step import ExactTokens, PrefillStep


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
    x = PrefillStep(q, k, v, kernel=kernel, step=step, state=state)
    exact = exact_tokens(x)
    phi_q = query_features(x)
    phi_in, v_in = entering(x, exact, late)
    chunk_states, chunk_normalisers = states_before_chunks(x, phi_in, v_in)
    chunk_outputs(x, exact, phi_q, phi_in, v_in, chunk_states, chunk_normalisers, out)
    if x.has_window:
        write_exact_rows(x, exact)


def exact_tokens(x: PrefillStep) -> ExactTokens:
    """Keys and values as a later step will find them."""
    near_keys, near_values = x.state.near_keys, x.state.near_values
    if near_keys is None or near_values is None:
        return ExactTokens(x.k, x.v, x.absent, x.absent)
    shape = (x.num_tokens, x.num_groups, x.head_size)
    rotated = x.scratch(*shape, dtype=near_keys.dtype)
    if x.is_int8:
        scales = (x.scratch(*shape[:2], dtype=torch.float32) for _ in range(2))
        exact = ExactTokens(rotated, x.scratch(*shape, dtype=torch.int8), *scales)
    else:
        exact = ExactTokens(rotated, x.v.to(near_values.dtype), x.absent, x.absent)
    keys_kernel[(x.layout.num_chunks, x.num_groups)](
        x.k,
        x.v,
        exact.keys,
        exact.values,
        exact.key_scales,
        exact.value_scales,
        x.rotary.cos,
        x.rotary.sin,
        *x.chunks,
        *x.k.stride()[:2],
        *x.v.stride()[:2],
        D=x.head_size,
        HALF=x.rotary.cos.shape[-1],
        C=CHUNK_TOKENS,
        BLOCK_D=x.block_d,
        num_warps=8 if x.is_int8 and x.block_d > 128 else 4,
        **OPTIONS,
    )
    return exact


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


def entering(x: PrefillStep, exact: ExactTokens, late: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """[T, G, K] and [T, G, d], what each token adds to the state; values keep their place without a window."""
    kernel, config = x.kernel, x.kernel.attention
    phi_in = x.scratch(x.num_tokens, x.num_groups, x.num_features, dtype=x.products.dtype)
    v_in = exact.values
    if x.has_window:
        v_in = x.scratch(*x.v.shape, dtype=x.products.dtype if x.is_int8 else exact.values.dtype)
    entering_kernel[(x.layout.num_chunks, x.num_groups)](
        x.k,
        exact.keys,
        exact.values,
        exact.key_scales,
        exact.value_scales,
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
        *x.ring,
        *x.chunks,
        *x.k.stride()[:2],
        *exact.values.stride()[:2],
        *x.ring_strides,
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
    exact: ExactTokens,
    phi_q: Tensor,
    phi_in: Tensor,
    v_in: Tensor,
    chunk_states: Tensor,
    chunk_normalisers: Tensor,
    out: Tensor,
) -> None:
    kernel, config = x.kernel, x.kernel.attention
    outputs_kernel[(x.layout.num_chunks, x.num_heads, triton.cdiv(x.head_size, x.block_v))](
        x.q,
        exact.keys,
        exact.values,
        exact.key_scales,
        exact.value_scales,
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
        *x.ring,
        *x.chunks,
        *x.q.stride()[:2],
        *exact.values.stride()[:2],
        *v_in.stride()[:2],
        *x.ring_strides,
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


def write_exact_rows(x: PrefillStep, exact: ExactTokens) -> None:
    exact_rows_kernel[(x.layout.num_sequences, x.num_groups)](
        exact.keys,
        exact.values,
        exact.key_scales,
        exact.value_scales,
        *x.ring,
        x.layout.slots,
        x.layout.positions,
        x.layout.cu_seqlens,
        *exact.values.stride()[:2],
        *x.ring_strides,
        D=x.head_size,
        WINDOW=x.kernel.attention.window,
        SINKS=x.kernel.attention.sinks,
        BLOCK_J=16,
        BLOCK_D=x.block_d,
        **OPTIONS,
    )
