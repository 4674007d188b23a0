"""Segments of layers with anchors by kernels, against torch's operator: answers, and every part of the states."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="needs the extra `triton`; run by `make test-triton`")

from dijiang_model.config import AnchorConfig
from dijiang_model.kernel import LinearKernel
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.torch.attention import TorchAttention
from dijiang_model.ops.triton import TritonAttention
from tests.dijiang_model.ops.triton.test_triton_attention import FEATURES, HAS_GPU, HYBRID, Layer, Shape
from tests.dijiang_model.stepping import assert_close_in_norm

pytestmark = [pytest.mark.cuda] if HAS_GPU else []
TOLERANCE = 1e-3
"""A number between two int8 codes may go to the other one where sums differ in their last bit."""
BF16_TOLERANCE = 2e-2
UNROTATED = replace(FEATURES, rotated=False)
KINDS = {
    "unrotated": UNROTATED,
    "rotated": FEATURES,
    "far queries": replace(UNROTATED, far_rank=3),
    "the paper's exp": replace(UNROTATED, normalisation="exp"),
    "a decayed mean": replace(UNROTATED, width=1),
    "none": replace(UNROTATED, width=0),
}
Steps = Sequence[tuple[Sequence[int], Mapping[int, int]]]


def scored(k: Tensor, kernel: LinearKernel, state: LayerState) -> LayerState:
    """With scores that follow from the keys, many of them equal."""
    return replace(state, token_scores=((k[..., 0].float() * 8).round() / 64).to(kernel.log_decay.dtype))


class ScoredTriton(TritonAttention):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
    ) -> Tensor:
        return super().__call__(q, k, v, kernel=kernel, layout=layout, state=scored(k, kernel, state))


class ScoredTorch(TorchAttention):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
    ) -> Tensor:
        return super().__call__(q, k, v, kernel=kernel, layout=layout, state=scored(k, kernel, state))


def shape_of(
    heads: Sequence[tuple[int, int]],
    *,
    features: str = "unrotated",
    sinks: int = 3,
    span: int = 0,
    age: float = 0.02,
    value_bits: int = 8,
    queries: int = 2,
    head_size: int = 16,
    rotary_dims: int = 8,
) -> Shape:
    """A layer whose heads have so large a window and so many anchors."""
    windows = tuple(max(window, span) for window, _ in heads)
    places = tuple(sinks + window + limit for window, (_, limit) in zip(windows, heads, strict=True))
    anchors = AnchorConfig(places, windows, age=age, span=span, value_bits=value_bits)
    attention = replace(HYBRID, features=KINDS[features], window=max(windows), sinks=sinks, anchors=anchors)
    return Shape(queries * len(heads), len(heads), head_size, rotary_dims, attention)


def check(shape: Shape, steps: Steps, *, dtype: torch.dtype = torch.float32, tolerance: float = TOLERANCE) -> None:
    """What is not held yet is NaN in our places, unless rows are decoded; slot 1 stays as it was, 0 is for padding."""
    lengths = [sum((n in decode) + prefill.get(n, 0) for decode, prefill in steps) for n in range(2)]
    lengths = [max(1, length) for length in lengths]
    ours = Layer(shape, lengths, dtype=dtype, op=ScoredTriton())
    twin = Layer(shape, lengths, dtype=torch.float64, op=ScoredTorch())
    for name, tensor in ours.buffer.tensors.items():
        if name.endswith(("scales", "scores")) and not any(decode for decode, _ in steps):
            tensor[2:] = torch.nan
        elif name.endswith("positions"):
            tensor[2:], twin.buffer.tensors[name][2:] = 5, 5
    untouched = ours.buffer.storage[1].clone()
    for decode, prefill in steps:
        found, expected = (layer.step(decode, prefill) for layer in (ours, twin))
        for n, answer in found.items():
            assert_close_in_norm(answer.float(), expected[n], tolerance=tolerance, what=f"sequence {n}")
    for name, tensor in ours.buffer.tensors.items():
        held, wanted = tensor[2:].cpu(), twin.buffer.tensors[name][2:]
        if name.endswith("positions"):
            assert torch.equal(held, wanted)
        elif name.endswith("near_values") and shape.attention.anchors.value_bits == 4:  # type: ignore[union-attr]
            assert (held != wanted).double().mean() < 0.01, "bytes of two codes each"
        elif held.numel() > 0:
            numbers = held.float().nan_to_num(nan=0.0)
            assert_close_in_norm(numbers, wanted.nan_to_num(nan=0.0), tolerance=tolerance, what=name)
    assert torch.equal(ours.buffer.storage[1], untouched)


@pytest.mark.skipif(HAS_GPU, reason="every example is compiled anew")
@settings(max_examples=8)
@given(
    heads=st.lists(st.tuples(st.integers(1, 9), st.sampled_from((0, 0, 1, 2, 5, 20))), min_size=1, max_size=3),
    features=st.sampled_from(tuple(KINDS)),
    sinks=st.integers(0, 4),
    span=st.integers(0, 3),
    age=st.sampled_from((0.0, 0.02)),
    value_bits=st.sampled_from((4, 8)),
    queries=st.integers(1, 3),
    head_size=st.sampled_from((16, 24)),
    cuts=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=3),
)
def test_segments_of_two_sequences_however_they_are_cut(
    heads: list[tuple[int, int]],
    features: str,
    sinks: int,
    span: int,
    age: float,
    value_bits: int,
    queries: int,
    head_size: int,
    cuts: list[tuple[int, int]],
) -> None:
    shape = shape_of(
        heads, features=features, sinks=sinks, span=span, age=age, value_bits=value_bits, queries=queries,
        head_size=head_size,
    )  # fmt: skip
    check(shape, [((), {n: length for n, length in enumerate(cut) if length > 0}) for cut in cuts])


@pytest.mark.parametrize("value_bits", [4, 8])
@pytest.mark.parametrize("features", ["unrotated", "none"])
def test_segments_of_several_chunks_behind_padding(features: str, value_bits: int) -> None:
    """133 tokens are past the range of sinks, 50; padding goes through torch, or the kernel of decode rows."""
    shape = shape_of([(20, 60), (7, 0)], features=features, span=3, value_bits=value_bits)
    check(shape, [((), {0: 33, 1: 1}), ((), {1: 65}), ((), {0: 100})])


def test_every_query_sees_itself_alone() -> None:
    check(shape_of([(1, 0), (1, 0)], sinks=0), [((), {0: 5, 1: 66}), ((), {0: 2})])


def test_far_apart_scores_are_weighed_against_the_largest() -> None:
    """The linear part's weight is beside weights relative to each query's largest score."""
    check(shape_of([(3, 4)], features="a decayed mean", head_size=64, rotary_dims=64, queries=3), [((), {0: 40})])


@pytest.mark.parametrize("head_size", [64, 80])
def test_products_of_bf16_models(head_size: int) -> None:
    shape = shape_of([(20, 30)], span=3, queries=3, head_size=head_size, rotary_dims=16)
    check(shape, [((), {0: 33, 1: 1}), ((), {1: 65})], dtype=torch.bfloat16, tolerance=BF16_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", list(KINDS))
def test_heads_of_128_and_more_candidates_than_a_block(features: str, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
    shape = shape_of([(30, 150), (64, 10)], features=features, span=3, head_size=128, rotary_dims=128)
    check(shape, [((), {0: 70, 1: 3}), ((0,), {1: 129}), ((), {0: 65}), ((0, 1), {})], dtype=dtype, tolerance=tolerance)
