"""The Triton operator against the naive reference: in Triton's interpreter, or on a GPU where there is one.

Outputs are compared with `dijiang_model.reference`, states with torch's operator in fp64 (which has the same twin).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the extra `triton`; run by `make test-triton`")

from dijiang_model.attention import DiJiangAttention, state_dtype
from dijiang_model.config import AttentionConfig, FeatureConfig, ModelConfig
from dijiang_model.features import node_radii
from dijiang_model.ops import AttentionOp
from dijiang_model.ops.layout import PrefillLayout, Rotary, StepLayout
from dijiang_model.ops.selection import step_angles
from dijiang_model.ops.torch.attention import TorchAttention
from dijiang_model.ops.torch.rounding import round_stochastically
from dijiang_model.ops.triton import TritonAttention, read_out
from dijiang_model.reference.network import Form, _attention
from dijiang_model.reference.rounding import round_row_naive
from dijiang_model.rotary import rotary_frequencies
from dijiang_model.state import StateBuffer, StateSpec
from tests.dijiang_model.stepping import POISON, assert_close_in_norm

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
pytestmark = [pytest.mark.cuda] if HAS_GPU else []

FP32_TOLERANCE = 3e-6
"""Of the norm: 6e-8 an operation, through exponents of size 10 and sums of some hundred terms."""
BF16_TOLERANCE = 2e-2
"""Operands of 8 bits, rounded up to five times on the way; the interpreter rounds to zero, a GPU to the nearest."""

SCALE = 64**-0.25
FEATURES = FeatureConfig(scale=SCALE)
PURE = AttentionConfig(features=FEATURES)
HYBRID = AttentionConfig(features=FEATURES, window=20, sinks=3)
RELEASED = AttentionConfig(FeatureConfig(("matrix",), nodes="checkpoint"), read_out="group_norm")


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer: query heads, key-value heads, head size, rotated channels of it, and what it computes."""

    num_heads: int
    num_groups: int
    head_size: int
    rotary_dims: int
    attention: AttentionConfig

    @property
    def config(self) -> ModelConfig:
        width = self.num_heads * self.head_size
        return ModelConfig(
            "gpt_neox", 260, width, 64, self.num_heads, self.num_groups, self.head_size, self.rotary_dims, 10_000.0,
            50, 1e-5, "gelu", False, False, False, True, (self.attention,), position_table_length=40,
        )  # fmt: skip


class _Attention(DiJiangAttention):
    """A layer without its projections."""


class Layer:
    """Random queries, keys and values of some sequences, fed to an operator step by step."""

    def __init__(
        self,
        shape: Shape,
        lengths: Sequence[int],
        *,
        dtype: torch.dtype,
        op: AttentionOp,
        has_bf16_sums: bool = False,
        is_int8: bool = False,
    ) -> None:
        self.shape, self.dtype, self.op = shape, dtype, op
        self.device = DEVICE if isinstance(op, TritonAttention) else torch.device("cpu")
        self.attention = random_attention(shape, dtype).to(self.device)
        self.attention.has_bf16_sums, self.attention.has_int8_window = has_bf16_sums, is_int8
        self.buffer = StateBuffer(StateSpec(self.attention.state_tensors()), len(lengths) + 2, self.device)
        self.buffer.storage.fill_(POISON)
        self.buffer.storage[2:] = 0
        self.fed = [0] * len(lengths)
        self.inputs = [random_inputs(shape, n, length) for n, length in enumerate(lengths)]

    def step(self, decode: Sequence[int], prefill: Mapping[int, int]) -> dict[int, Tensor]:
        """One token of each sequence of `decode`, then so many tokens of each of `prefill`; [t, H, d] by sequence.

        Between the two lies a padding row on slot 0. Slots: 2 for sequence 0, and so on; slot 1 stays poisoned.
        """
        wanted = [(n, 1) for n in decode] + [*prefill.items()]
        pieces = [tuple(x[self.fed[n] : self.fed[n] + count] for x in self.inputs[n]) for n, count in wanted]
        padding = tuple(torch.ones_like(x[:1]) for x in self.inputs[0])
        pieces.insert(len(decode), padding)
        q, k, v = (torch.cat(parts).to(self.device, self.dtype) for parts in zip(*pieces, strict=True))
        positions = [torch.arange(self.fed[n], self.fed[n] + count) for n, count in wanted]
        positions.insert(len(decode), torch.zeros(1, dtype=torch.int64))
        num_decode, slots = len(decode) + 1, torch.tensor([*(n + 2 for n in decode), 0, *(n + 2 for n in prefill)])
        layout = self._layout(torch.cat(positions), slots.to(self.device), num_decode, tuple(prefill.values()))
        state = self.attention.layer_state(self.buffer)
        with torch.no_grad():
            out = self.op(q, k, v, kernel=self.attention.linear, layout=layout, state=state).cpu()
        assert torch.isfinite(out[torch.arange(len(out)) != len(decode)]).all()
        for n, count in wanted:
            self.fed[n] += count
        parts = out.split([len(piece[0]) for piece in pieces])
        return dict(zip([n for n, _ in wanted], [*parts[: len(decode)], *parts[len(decode) + 1 :]], strict=True))

    def _layout(self, positions: Tensor, slots: Tensor, num_decode: int, lengths: tuple[int, ...]) -> StepLayout:
        config, positions = self.shape.config, positions.to(self.device)
        rotary, sink_rotary = step_angles(
            positions,
            frequencies=rotary_frequencies(config.rotary_dims, theta=config.rope_theta),
            last_sink=config.max_position_embeddings - 1,
            dtype=state_dtype(self.dtype),
        )
        prefill = PrefillLayout(positions[num_decode:], slots[num_decode:], lengths) if lengths else None
        return StepLayout(num_decode, positions, slots[:num_decode], rotary, sink_rotary, prefill)

    def run(self, steps: Sequence[tuple[Sequence[int], Mapping[int, int]]]) -> list[Tensor]:
        """All steps; [T, H, d] of each sequence."""
        parts: list[list[Tensor]] = [[] for _ in self.inputs]
        for decode, prefill in steps:
            for n, part in self.step(decode, prefill).items():
                parts[n].append(part)
        return [torch.cat(part) for part in parts]


def random_attention(shape: Shape, dtype: torch.dtype) -> DiJiangAttention:
    """Every part at work; the same numbers in every dtype."""
    attention, random = _Attention(shape.config, 0, dtype=dtype), torch.Generator().manual_seed(4)
    for name, parameter in attention.linear.named_parameters():
        noise = torch.randn(parameter.shape, generator=random)
        parameter.data.copy_(_start(name, noise, shape.config))
    attention.linear.prepare()
    attention.requires_grad_(False)
    return attention


def _start(name: str, noise: Tensor, config: ModelConfig) -> Tensor:
    if name == "nodes":
        return node_radii("midpoint", noise.shape[1]).float() + 0.1 * noise
    if name == "log_decay":
        return -(noise.abs() * 0.1 + 0.01)
    if name in ("read_table", "write_table"):
        steps = torch.arange(noise.shape[1]) * 0.03
        return (-steps if name == "read_table" else steps).exp() * (1 + 0.1 * noise)
    if name == "projection":
        return noise * config.head_size**-0.5
    return noise * (0.1 if name != "far_query_down" else noise.shape[-1] ** -0.5)


@cache
def random_inputs(shape: Shape, n: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(100 + n)
    q = torch.randn(length, shape.num_heads, shape.head_size, generator=random)
    k, v = torch.randn(2, length, shape.num_groups, shape.head_size, generator=random)
    return tuple(x.bfloat16().float() for x in (q, k, v))  # type: ignore[return-value]  # the same in every dtype


def reference_output(shape: Shape, n: int, length: int, *, is_int8: bool = False) -> Tensor:
    """[T, H * d] in fp64; with the `group_norm` read-out after the norm and an open gate.

    `is_int8`: of keys and values that went through int8; of shapes without rotation.
    """
    q, k, v = (x.double() for x in random_inputs(shape, n, length))
    if is_int8:
        assert shape.rotary_dims == 0
        k, v = widened_naive(k), widened_naive(v)
    own = random_attention(shape, torch.float64).state_dict()
    width, norm = shape.num_heads * shape.head_size, torch.linspace(0.5, 1.5, shape.num_heads * shape.head_size)
    part = {**own, "gate.weight": torch.zeros(width, width, dtype=torch.float64)}
    part |= {"group_norm.weight": norm.double(), "group_norm.bias": norm.double() - 1}
    normed = torch.zeros(length, width, dtype=torch.float64)
    if shape.attention.read_out == "group_norm":
        part["gate.weight"], normed = torch.eye(width, dtype=torch.float64), gates(length, width).double()
    form: Form = "recurrent" if shape.attention.window else "parallel"
    return _attention(shape.config, shape.attention, part, q, k, v, normed=normed, form=form)


def widened_naive(rows: Tensor) -> Tensor:
    """[..., d] as it is after int8, by the naive twin."""
    int8 = [round_row_naive(row) for row in rows.flatten(0, -2).tolist()]
    return torch.stack([torch.tensor(codes) * scale for codes, scale in int8]).view_as(rows).to(rows.dtype)


def gates(length: int, width: int) -> Tensor:
    return torch.randn(length, width, generator=torch.Generator().manual_seed(9)).bfloat16().float()


def read(shape: Shape, raw: Tensor) -> Tensor:
    """[T, H, d] of the operator -> [T, H * d] as the layer hands it on."""
    if shape.attention.read_out == "denominator":
        return raw.flatten(1)
    width = raw[0].numel()
    norm = torch.nn.GroupNorm(shape.head_size, width, device=DEVICE).requires_grad_(False)
    norm.weight.copy_(torch.linspace(0.5, 1.5, width))
    norm.bias.copy_(norm.weight - 1)
    return read_out.gated_norm(raw.to(DEVICE), gates(len(raw), width).to(DEVICE), norm).cpu()


def check(shape: Shape, lengths: Sequence[int], steps: Sequence[tuple[Sequence[int], Mapping[int, int]]], *,
          dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
    """Outputs against the reference, states against torch's operator in fp64; slots 0 and 1 stay as they were."""
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
    layer = Layer(shape, lengths, dtype=dtype, op=TritonAttention())
    untouched = layer.buffer.storage[:2].clone()
    outputs = layer.run(steps)
    twin = Layer(shape, lengths, dtype=torch.float64, op=TorchAttention())
    twin.run(steps)
    for n, output in enumerate(outputs):
        expected = reference_output(shape, n, lengths[n])[: len(output)]
        assert_close_in_norm(read(shape, output.float()), expected, tolerance=tolerance, what=f"sequence {n}")
        for name, tensor in layer.buffer.tensors.items():
            assert_close_in_norm(tensor[n + 2].cpu(), twin.buffer.tensors[name][n + 2], tolerance=tolerance, what=name)
    assert torch.equal(layer.buffer.storage[:2], untouched)


GROUPED = Shape(3, 1, 64, 64, replace(HYBRID, features=replace(FEATURES, rotated=False, far_rank=3)))
BOTH = [((), {0: 33, 1: 1}), ((0,), {1: 65}), ((0, 1), {})]
"""Two sequences: packed segments, a decode row beside a segment that spans two chunks, two decode rows."""


def test_grouped_heads_with_window_sinks_and_far_queries_of_unrotated_features() -> None:
    check(GROUPED, (35, 67), BOTH)


def test_the_same_in_bf16() -> None:
    check(GROUPED, (35, 67), BOTH, dtype=torch.bfloat16)


def test_heads_of_80_with_partial_rotation_and_no_window() -> None:
    check(Shape(2, 2, 80, 20, PURE), (35, 67), BOTH)


def test_position_tables_without_denominator_past_their_end() -> None:
    check(Shape(2, 2, 80, 20, replace(RELEASED, decay="table")), (67,), [((), {0: 65}), ((0,), {}), ((0,), {})])


def test_angles_keep_their_precision_at_a_million() -> None:
    positions = torch.tensor([0, 1, 49, 50, 1_000_003], device=DEVICE)
    made = read_out.angles(positions, frequencies=rotary_frequencies(20, theta=10_000.0), last_sink=49)
    for rotary, at in zip(made, (positions, positions.clamp(max=49)), strict=True):
        expected = Rotary.at(at.cpu(), frequencies=rotary_frequencies(20, theta=10_000.0), dtype=torch.float64)
        torch.testing.assert_close(rotary.cos.cpu().double(), expected.cos, rtol=0, atol=1e-7)
        torch.testing.assert_close(rotary.sin.cpu().double(), expected.sin, rtol=0, atol=1e-7)


WIDE = replace(HYBRID, features=replace(FEATURES, bases=("dct2", "dct4")))
SHAPES = {
    "128, two bases: a tile of several turns": Shape(1, 1, 128, 128, WIDE),
    "256, window": Shape(2, 1, 256, 64, HYBRID),
    "64, four queries to a key, window of more than two chunks": Shape(4, 1, 64, 64, replace(HYBRID, window=150)),
    "64, window 1": Shape(1, 1, 64, 64, replace(HYBRID, window=1, sinks=0)),
    "64, more sinks than window": Shape(2, 1, 64, 0, replace(HYBRID, window=3, sinks=40)),
    "80, window, rotated features, far queries": Shape(
        2, 2, 80, 80, replace(HYBRID, features=replace(FEATURES, far_rank=5))
    ),
    "64, the paper's exp features, unrotated": Shape(
        2, 1, 64, 64, replace(PURE, features=replace(FEATURES, normalisation="exp", rotated=False))
    ),
    "80, released, static decay": Shape(2, 2, 80, 20, RELEASED),
}
PIECES = [((), {0: 1}), ((), {0: 64, 1: 63}), ((0, 1), {}), ((1,), {0: 66}), ((0, 1), {}), ((0,), {1: 2})]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_in_pieces_of_all_lengths(name: str, dtype: torch.dtype) -> None:
    """133 and 68 tokens: past the trained range of 50, beyond which sinks are scored with a capped rotation."""
    check(SHAPES[name], (134, 68), PIECES, dtype=dtype)


@pytest.mark.parametrize("decode", [True, False])
def test_states_in_bf16_are_rounded_by_chance_as_everywhere(decode: bool) -> None:
    """The same fp32 sums, stored in either dtype; what a step reads are bf16 numbers in both."""
    shape = Shape(1, 1, 64, 64, PURE)
    wide, narrow = (
        Layer(shape, (9,), dtype=torch.float32, op=TritonAttention(), has_bf16_sums=has_bf16_sums)
        for has_bf16_sums in (False, True)
    )
    start = torch.randn(64, 64, generator=torch.Generator().manual_seed(8)).bfloat16().to(DEVICE)
    for layer in (wide, narrow):
        layer.attention.layer_state(layer.buffer).linear_state[2, 0] = start
        layer.fed = [3]
        layer.step([0], {}) if decode else layer.step([], {0: 5})
    sums = wide.attention.layer_state(wide.buffer).linear_state[2].cpu()
    expected = round_stochastically(sums[None], torch.tensor([3 if decode else 7]))[0]
    found = narrow.attention.layer_state(narrow.buffer).linear_state[2].cpu()
    assert torch.equal(found, expected)
    assert not torch.equal(found, sums.bfloat16()), "not to the nearest"


def test_fp32_models_with_states_in_bf16_keep_their_near_rows_as_torch_does() -> None:
    """The ring is bf16 then; what a chance has rounded differs by a unit in its last place here and there."""
    shape = Shape(2, 1, 64, 64, replace(HYBRID, window=4, sinks=1))
    steps: list[tuple[list[int], dict[int, int]]] = [([], {0: 9}), ([0], {})]
    ours, torchs = (
        Layer(shape, (10,), dtype=torch.float32, op=op, has_bf16_sums=True)
        for op in (TritonAttention(), TorchAttention())
    )
    (output,), (expected,) = ours.run(steps), torchs.run(steps)
    assert_close_in_norm(output, expected, tolerance=BF16_TOLERANCE)
    for name, tensor in ours.buffer.tensors.items():
        assert_close_in_norm(tensor[2].cpu(), torchs.buffer.tensors[name][2], tolerance=BF16_TOLERANCE, what=name)


def test_states_that_the_kernels_do_not_know_are_refused() -> None:
    layer = Layer(Shape(1, 1, 64, 64, PURE), (2,), dtype=torch.float32, op=TritonAttention())
    tensors = {name: tensor.to(torch.int8) for name, tensor in layer.buffer.tensors.items()}
    layer.buffer.tensors = tensors
    with pytest.raises(ValueError, match=r"float32 or bfloat16, not torch\.int8"):
        layer.step([0], {})


def test_heads_of_8_are_filled_up_to_what_matrix_units_take() -> None:
    two_bases = replace(HYBRID.features, bases=("dct2", "dct4"))  # 16 features: fewer are left to torch
    check(Shape(2, 1, 8, 8, replace(HYBRID, window=5, features=two_bases)), (35, 67), BOTH)
