"""States in int8 in the Triton operator: the window as codes with scales, the sums in bf16 by chance."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the extra `triton`; run by `make test-triton`")

from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops.torch.attention import TorchAttention
from dijiang_model.ops.torch.rounding import round_stochastically
from dijiang_model.ops.triton import TritonAttention
from dijiang_model.reference.rounding import round_row_naive
from tests.dijiang_model.ops.triton.test_triton_attention import (
    BF16_TOLERANCE,
    BOTH,
    DEVICE,
    FP32_TOLERANCE,
    GROUPED,
    HAS_GPU,
    HYBRID,
    PIECES,
    SHAPES,
    Layer,
    Shape,
    read,
    reference_output,
)
from tests.dijiang_model.stepping import Stepper, assert_close_in_norm, random_text
from tests.tiny_models import llama_config, tiny_model

pytestmark = [pytest.mark.cuda] if HAS_GPU else []
Steps = Sequence[tuple[Sequence[int], Mapping[int, int]]]

TIE_TOLERANCE = 3e-4
"""A number beside a tie may get the other code where rotations differ in their last bit: one of thousands, by 1/127."""
NARROW_TOLERANCE = 3e-2
"""Of networks on states in int8, by any two operators."""
UNROTATED = replace(GROUPED, rotary_dims=0)
SMALL = Shape(2, 1, 64, 64, replace(HYBRID, window=4, sinks=2))
NEAR = ("near_keys", "near_values")


def int8_layer(shape: Shape, lengths: Sequence[int], *, dtype: torch.dtype = torch.float32, torchs: bool = False,
                has_bf16_sums: bool = False) -> Layer:  # fmt: skip
    op = TorchAttention() if torchs else TritonAttention()
    return Layer(shape, lengths, dtype=dtype, op=op, has_bf16_sums=has_bf16_sums, is_int8=True)


def near_of(layer: Layer, kind: str) -> Tensor:
    """[P, G, Z + W, d] as steps read them."""
    rows = layer.buffer.tensors[f"layers.0.{kind}"]
    return rows.float() * layer.buffer.tensors[f"layers.0.{kind.removesuffix('s')}_scales"][..., None]


def check_int8(shape: Shape, lengths: Sequence[int], steps: Steps, *, dtype: torch.dtype, tolerance: float) -> None:
    """Outputs and states against torch's operator in fp64, which rounds rows alike; slots 0 and 1 stay as they were."""
    ours, twin = int8_layer(shape, lengths, dtype=dtype), int8_layer(shape, lengths, dtype=torch.float64, torchs=True)
    untouched = ours.buffer.storage[:2].clone()
    for n, (output, expected) in enumerate(zip(ours.run(steps), twin.run(steps), strict=True)):
        assert_close_in_norm(output.float(), expected, tolerance=tolerance, what=f"sequence {n}")
    for name, tensor in twin.buffer.tensors.items():
        if tensor.is_floating_point():
            assert_close_in_norm(ours.buffer.tensors[name][2:].cpu(), tensor[2:], tolerance=tolerance, what=name)
    for kind in NEAR:
        assert_close_in_norm(near_of(ours, kind)[2:].cpu(), near_of(twin, kind)[2:], tolerance=tolerance, what=kind)
    assert torch.equal(ours.buffer.storage[:2], untouched)


def test_a_window_in_int8_answers_what_the_naive_reference_says_of_rounded_rows() -> None:
    lengths = (35, 67)
    outputs = int8_layer(UNROTATED, lengths).run(BOTH)
    for n, output in enumerate(outputs):
        expected = reference_output(UNROTATED, n, lengths[n], is_int8=True)[: len(output)]
        assert_close_in_norm(read(UNROTATED, output), expected, tolerance=FP32_TOLERANCE, what=f"sequence {n}")


def test_what_is_left_in_the_slots_is_what_torchs_operator_leaves() -> None:
    check_int8(UNROTATED, (35, 67), BOTH, dtype=torch.float32, tolerance=FP32_TOLERANCE)


def test_rotated_keys_are_rounded_after_their_rotation_and_turned_back_on_leaving() -> None:
    check_int8(GROUPED, (35, 67), BOTH, dtype=torch.float32, tolerance=TIE_TOLERANCE)


def test_the_same_in_bf16() -> None:
    check_int8(GROUPED, (35, 67), BOTH, dtype=torch.bfloat16, tolerance=BF16_TOLERANCE)


WINDOWS = ("128, two bases: a tile of several turns", "256, window", "64, four queries to a key, window of more than "
           "two chunks", "64, window 1", "64, more sinks than window")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WINDOWS)
def test_other_shapes_in_pieces_of_all_lengths(name: str, dtype: torch.dtype) -> None:
    tolerance = TIE_TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
    check_int8(SHAPES[name], (134, 68), PIECES, dtype=dtype, tolerance=tolerance)


def test_codes_and_scales_are_the_naive_twins_to_the_bit() -> None:
    """Of the same rows in fp32, by prefill and decode; a row of zeros and rows that are not finite among them."""
    wide = Layer(SMALL, (9,), dtype=torch.float32, op=TritonAttention())
    int8 = int8_layer(SMALL, (9,))
    for layer in (wide, int8):
        q, k, v = (x.clone() for x in layer.inputs[0])
        v[4], v[8] = 0.0, torch.arange(64).float() - 31.5  # of which many lie at ties
        layer.inputs = [(q, k, v)]
        layer.step([], {0: 7})
        layer.step([0], {})
        layer.step([0], {})
    for kind in NEAR:
        rows = wide.buffer.tensors[f"layers.0.{kind}"][2]
        assert_rounded_as_the_twin_does(rows, int8, kind)


# Of the interpreter, where maxima of what is not finite are taken.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("decode", [True, False])
def test_a_row_that_is_not_finite_has_the_scale_nan(value: float, decode: bool) -> None:
    layer = int8_layer(SMALL, (3,))
    q, k, v = (x.clone() for x in layer.inputs[0])
    v[0, 0, 5], k[0, 0, 7] = value, value
    layer.inputs = [(q, k, v)]
    with pytest.raises(AssertionError):  # of what a step is to answer: here NaN
        layer.step([0], {}) if decode else layer.step([], {0: 2})
    for kind in NEAR:
        scales = layer.buffer.tensors[f"layers.0.{kind.removesuffix('s')}_scales"][2, 0]
        # Of six rows that of the sink, and that of the ring.
        assert scales.isnan().tolist() == [True, False, True, False, False, False]
        assert not layer.buffer.tensors[f"layers.0.{kind}"][2, 0, 0].any()


def assert_rounded_as_the_twin_does(rows: Tensor, int8: Layer, kind: str) -> None:
    """Rows [G, Z + W, d] of fp32 against the codes of slot 2."""
    codes = int8.buffer.tensors[f"layers.0.{kind}"][2].cpu()
    scales = int8.buffer.tensors[f"layers.0.{kind.removesuffix('s')}_scales"][2].cpu()
    for g, group in enumerate(rows.cpu()):
        for row, found, scale in zip(group, codes[g], scales[g], strict=True):
            expected, expected_scale = round_row_naive(row.tolist())
            assert found.tolist() == expected
            assert float(scale) == expected_scale


@pytest.mark.parametrize("decode", [True, False])
def test_sums_beside_a_window_in_int8_are_rounded_by_chance_as_everywhere(decode: bool) -> None:
    wide, narrow = (int8_layer(SMALL, (16,), has_bf16_sums=has_bf16_sums) for has_bf16_sums in (False, True))
    for layer in (wide, narrow):
        layer.step([], {0: 6})  # nothing has left the window yet
        layer.step([0], {}) if decode else layer.step([], {0: 9})
    sums = wide.buffer.tensors["layers.0.linear_state"][2].cpu()
    expected = round_stochastically(sums[None], torch.tensor([6 if decode else 14]))[0]
    found = narrow.buffer.tensors["layers.0.linear_state"][2].cpu()
    assert sums.any()
    assert torch.equal(found, expected)
    assert not torch.equal(found, sums.bfloat16()), "not to the nearest"


def test_a_state_is_the_same_to_the_bit_in_any_company() -> None:
    lengths = (9, 67, 5)
    alone: Steps = [((), {0: 7}), ((0,), {}), ((0,), {})]
    beside: Steps = [((), {1: 65, 0: 7, 2: 3}), ((2, 0), {1: 1}), ((1, 0), {2: 1})]
    single, packed = (int8_layer(SMALL, lengths, has_bf16_sums=True) for _ in range(2))
    outputs = [torch.cat([layer.step(*step)[0] for step in steps]) for layer, steps in
               ((single, alone), (packed, beside))]  # fmt: skip
    assert torch.equal(*outputs)
    assert torch.equal(single.buffer.storage[2], packed.buffer.storage[2])


def int8_model(*, triton: bool) -> DiJiangForCausalLM:
    model = tiny_model(llama_config()).keep_states_in(torch.int8)
    if triton:
        model = model.to(DEVICE).prepare()
        model.attention_op = TritonAttention()
    return model


@pytest.mark.parametrize("from_triton", [True, False])
def test_a_state_goes_from_one_kind_of_device_to_the_other_and_on(from_triton: bool) -> None:
    text = random_text(19)
    source, target = (Stepper(int8_model(triton=is_triton)).open(1) for is_triton in (from_triton, not from_triton))
    assert source.buffer.spec == target.buffer.spec
    for stepper in (source, target):
        stepper.step({1: text[:14]})
    target.buffer.storage[1] = source.buffer.storage[1].to(target.buffer.storage.device)
    for token in text[14:]:
        expected, found = (stepper.step(decode={1: token})[1].cpu() for stepper in (source, target))
    assert_close_in_norm(found, expected, tolerance=NARROW_TOLERANCE)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_a_key_that_is_not_finite_is_not_forgotten() -> None:
    stepper = Stepper(int8_model(triton=True)).open(1)
    stepper.step({1: random_text(3)})
    stepper.buffer.tensors["layers.0.near_key_scales"][1, 0, 0] = torch.nan
    assert stepper.step(decode={1: 5})[1].isnan().any()
