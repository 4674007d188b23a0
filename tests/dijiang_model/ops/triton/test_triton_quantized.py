"""Products with rounded weights in Triton's kernels, against the naive codes: in the interpreter, or on a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="needs the extra `triton`; run by `make test-triton`")

from dijiang_model.checkpoints.quantized import quantize_
from dijiang_model.ops import selection
from dijiang_model.ops.quantized import QuantizedMatrix
from dijiang_model.ops.torch.attention import TorchAttention
from dijiang_model.ops.triton import quantized
from dijiang_model.ops.triton.quantized import ROWS_AT_ONCE, WIDENED_FROM, ProductBlocks
from dijiang_model.quantization import weight as weight_module
from dijiang_model.quantization.config import INT8, Quantization
from dijiang_model.quantization.weight import Int4Weight, Int8Weight, QuantizedWeight
from dijiang_model.reference.quantization import weight_naive
from tests.dijiang_model.stepping import assert_close_in_norm, logits_of, random_text
from tests.tiny_models import HYBRID, gpt_neox_config, llama_config, tiny_model
from tests.waiting import PATIENCE_S

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
pytestmark = [pytest.mark.cuda] if HAS_GPU else []
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no CUDA device")

FORMS = {
    "int8": INT8,
    "int4": Quantization("int4", group_size=32),
    "int4, groups of 64": Quantization("int4", group_size=64),
    "int4 with minimums": Quantization("int4", group_size=32, has_minimums=True),
    "int4, groups of 64 with minimums": Quantization("int4", group_size=64, has_minimums=True),
}
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Of the norm: sums in fp32, of larger terms where there are minimums; the result rounded, by the interpreter to 0."""
SHAPES = ((37, 100), (64, 192), (5, 31), (130, 64))
"""Outputs and columns: odd, whole blocks, less than one of each, two blocks of lines and a rest."""
CASES = (
    *((shape, dtype, num_rows) for shape in SHAPES for dtype in TOLERANCES for num_rows in (1, 9)),
    *((SHAPES[0], dtype, num_rows) for dtype in TOLERANCES for num_rows in (ROWS_AT_ONCE + 1, WIDENED_FROM)),
)


@pytest.fixture(params=list(FORMS))
def form(request: pytest.FixtureRequest) -> Quantization:
    return FORMS[request.param]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def weight_of(shape: tuple[int, int], form: Quantization) -> tuple[QuantizedWeight, Tensor]:
    """Random codes, on the CPU, and what they stand for."""
    whole = random(*shape, seed=1)
    made = Int8Weight.of(whole) if form.weights == "int8" else Int4Weight.of(whole, form)
    return made, weight_naive(made)


def on_device(matrix: QuantizedMatrix) -> QuantizedMatrix:
    minimums = None if matrix.minimums is None else matrix.minimums.to(DEVICE)
    return replace(matrix, codes=matrix.codes.to(DEVICE), scales=matrix.scales.to(DEVICE), minimums=minimums)


def exact(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    product = x.double().cpu() @ values.T
    return product if bias is None else product + bias.double().cpu()


@pytest.mark.parametrize(("shape", "dtype", "num_rows"), CASES)
def test_products_equal_those_with_the_naive_weights(
    shape: tuple[int, int], form: Quantization, dtype: torch.dtype, num_rows: int
) -> None:
    weight, values = weight_of(shape, form)
    x, bias = random(num_rows, shape[1], seed=2).to(DEVICE, dtype), random(shape[0], seed=3).to(DEVICE, dtype)
    for added in (None, bias):
        found = quantized.product(x, on_device(weight.rounded), added)
        assert (found.dtype, found.shape) == (dtype, (num_rows, shape[0]))
        assert_close_in_norm(found.double().cpu(), exact(x, values, added), tolerance=TOLERANCES[dtype])


def test_fp32_rows_keep_all_their_bits(form: Quantization) -> None:
    """Numbers that differ from 1 by what bf16 would lose."""
    weight, values = weight_of((6, 64), form)
    x = torch.ones(2, 64) + random(2, 64, seed=4) * 2**-14
    found = quantized.product(x.to(DEVICE), on_device(weight.rounded), None).double().cpu()
    expected = exact(x, values, None)
    # fp32's roundings, of sums that are a few times larger before minimums are taken off.
    tolerance = 2**-20 * float(values.abs().sum(1).max())
    assert (found - expected).abs().max() < tolerance
    assert (exact(torch.ones(2, 64), values, None) - expected).abs().max() > 4 * tolerance


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_splitting_the_columns_changes_only_the_order_of_sums(
    form: Quantization, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "PROGRAMS", programs)
    monkeypatch.setattr(quantized, "UNSPLIT_BYTES", 0)
    weight, values = weight_of((37, 200), form)
    splits = ProductBlocks.of(weight.rounded, 3, torch.float32).splits
    assert (splits == 1) == (programs == 1)
    x, bias = random(3, 200, seed=5).to(DEVICE), random(37, seed=6).to(DEVICE)
    found = quantized.product(x, on_device(weight.rounded), bias)
    assert_close_in_norm(found.double().cpu(), exact(x, values, bias), tolerance=1e-6)


@given(
    lines=st.integers(1, 60_000),
    columns=st.integers(1, 20_000),
    group=st.sampled_from([0, 32, 64]),
    dtype=st.sampled_from(list(TOLERANCES)),
)
def test_tiles_cover_every_column_once_and_alike_for_up_to_64_rows(
    lines: int, columns: int, group: int, dtype: torch.dtype
) -> None:
    codes = torch.empty((lines, columns), dtype=torch.int8, device="meta")
    matrix = QuantizedMatrix(codes, codes, None, lines, group)
    cuts = set()
    for num_rows in (1, 2, 17, 63, 64, 65, 1023):
        blocks = ProductBlocks.of(matrix, num_rows, dtype)
        assert blocks.columns_of_split % blocks.columns == 0
        assert (blocks.splits - 1) * blocks.columns_of_split < columns <= blocks.splits * blocks.columns_of_split
        if num_rows <= ROWS_AT_ONCE:
            cuts.add((blocks.lines, blocks.columns, blocks.columns_of_split, blocks.splits, blocks.warps))
        else:
            assert blocks.splits == 1
    assert len(cuts) == 1


@pytest.mark.parametrize("shape", [(576, 576), (576, 1536), (960, 576), (3072, 576)])
def test_a_product_of_a_small_model_is_one_launch_of_programs_that_read_little(shape: tuple[int, int]) -> None:
    for group in (0, 32):
        lines = shape[0] if group == 0 else shape[0] // 2
        codes = torch.empty((lines, shape[1]), dtype=torch.int8, device="meta")
        blocks = ProductBlocks.of(QuantizedMatrix(codes, codes, None, shape[0], group), 1, torch.bfloat16)
        assert blocks.splits == 1
        assert blocks.lines * shape[1] <= 48 << 10


@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11_008), (49_152, 576)])
def test_one_row_of_a_large_matrix_fills_an_h100(shape: tuple[int, int]) -> None:
    for group in (0, 32):
        lines = shape[0] if group == 0 else shape[0] // 2
        codes = torch.empty((lines, shape[1]), dtype=torch.int8, device="meta")
        blocks = ProductBlocks.of(QuantizedMatrix(codes, codes, None, shape[0], group), 1, torch.bfloat16)
        assert -(-lines // blocks.lines) * blocks.splits >= 132


def test_a_row_that_is_not_finite_leaves_the_others_alone(form: Quantization) -> None:
    weight, _ = weight_of((37, 100), form)
    x = random(4, 100, seed=7).to(DEVICE)
    before = quantized.product(x, on_device(weight.rounded), None)
    x[2] = float("nan")
    after = quantized.product(x, on_device(weight.rounded), None)
    assert after[2].isnan().all()
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])


def test_rows_of_any_shape_and_stride_are_taken() -> None:
    weight, values = weight_of((37, 100), INT8)
    x = random(2, 3, 200, seed=8).to(DEVICE)[..., ::2]
    found = quantized.product(x, on_device(weight.rounded), None)
    expected = exact(x.reshape(6, 100), values, None).view(2, 3, 37)
    assert_close_in_norm(found.double().cpu(), expected, tolerance=1e-6)
    assert quantized.product(x[:0], on_device(weight.rounded), None).shape == (0, 3, 37)


def test_the_parts_of_a_split_networks_rows_and_columns_make_up_the_whole() -> None:
    for form in FORMS.values():
        weight, values = weight_of((36, 128), form)
        whole = weight.rounded
        size, x = form.group_size, random(3, 128, seed=9)
        total = torch.zeros(3, 36, dtype=torch.float64)
        for first in (0, 64):
            groups = slice(None) if size == 0 else (slice(None), slice(first // size, (first + 64) // size))
            minimums = None if whole.minimums is None else whole.minimums[groups].contiguous()
            part = replace(
                whole,
                codes=whole.codes[:, first : first + 64].contiguous(),
                scales=whole.scales[groups].contiguous(),
                minimums=minimums,
            )
            total += quantized.product(x[:, first : first + 64].to(DEVICE), on_device(part), None).double().cpu()
        assert_close_in_norm(total, exact(x, values, None), tolerance=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_matrix_written_out_is_what_its_codes_stand_for(form: Quantization, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight, values = weight_of(shape, form)
        found = quantized.widened(on_device(weight.rounded), dtype).double().cpu()
        assert_close_in_norm(found, values, tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("columns", [1, 100, 1030])
def test_tokens_are_looked_up_and_unknown_ones_are_not_a_number(dtype: torch.dtype, columns: int) -> None:
    weight, values = weight_of((37, columns), INT8)
    ids = torch.tensor([[36, 0, 5], [5, 37, -1]])
    found = quantized.looked_up(ids.to(DEVICE), on_device(weight.rounded), dtype).double().cpu()
    assert found.shape == (2, 3, columns)
    known = (ids >= 0) & (ids < 37)
    assert found[~known].isnan().all()
    assert_close_in_norm(found[known], values[ids[known]], tolerance=TOLERANCES[dtype])
    assert quantized.looked_up(ids[:0].to(DEVICE), on_device(weight.rounded), dtype).shape == (0, 3, columns)


@pytest.mark.parametrize("name", ["int8", "int4, groups of 64 with minimums"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_whole_network_answers_the_same_with_and_without_the_kernels(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = {"llama": llama_config(HYBRID), "gpt_neox": gpt_neox_config()}[family]
    model = quantize_(tiny_model(config), FORMS[name]).to(DEVICE).prepare()
    model.attention_op = TorchAttention()
    text = random_text(7)
    monkeypatch.setattr(weight_module, "load_library", lambda: None)
    monkeypatch.setattr(selection, "has_kernels", lambda device, dtype: False)
    without = logits_of(model, text)
    calls: list[int] = []
    product = quantized.product

    def counted(x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None) -> Tensor:
        calls.append(matrix.num_outputs)
        return product(x, matrix, bias)

    monkeypatch.setattr(quantized, "product", counted)
    monkeypatch.setattr(selection, "has_kernels", lambda device, dtype: True)
    assert_close_in_norm(logits_of(model, text).double().cpu(), without.double().cpu(), tolerance=1e-5)
    assert config.vocab_size in calls, "the head, too"
    assert len(calls) > 4 * config.num_layers


def test_whoever_wants_gradients_gets_torchs_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_module, "load_library", lambda: None)
    monkeypatch.setattr(selection, "has_kernels", lambda device, dtype: True)
    weight, values = weight_of((37, 100), INT8)
    x = random(2, 100, seed=10).requires_grad_()
    weight.product(x).sum().backward()
    assert x.grad is not None
    assert_close_in_norm(x.grad.double(), values.sum(0).expand(2, -1), tolerance=1e-6)


@pytest.mark.slow
def test_every_kernel_compiles_and_fits_without_spills() -> None:
    """Of devices that run code for 8.0 the smallest have 99 KiB of shared memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.dijiang_model.ops.triton.triton_quantized_compiling", "bf16"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10 * PATIENCE_S, check=False)
    assert run.returncode == 0, run.stderr
    *lines, variants = [json.loads(line) for line in run.stdout.splitlines()]
    tiles = {"quantized_product_kernel": 4, "sum_splits_kernel": 1}
    assert variants == {"variants": tiles}, "16, 32 or 64 rows to a tile, or many: no more, whatever the rows"
    names = {"quantized_product_kernel", "sum_splits_kernel", "widen_kernel", "look_up_kernel"}
    assert {line["kernel"] for line in lines} == names
    assert max(line["shared_bytes"] for line in lines) <= 99 * 1024
    assert max(line["stack_bytes"] for line in lines) == 0


@needs_gpu
@pytest.mark.parametrize("shape", [(576, 1536), (8192, 576)])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_row_has_the_same_bits_every_time_and_in_any_company(
    form: Quantization, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    codes, scales, minimums = random_parts(shape, form)
    matrix = QuantizedMatrix(codes, scales, minimums, shape[0], form.group_size)
    x = random(ROWS_AT_ONCE, shape[1], seed=11).to(DEVICE, dtype)
    whole = quantized.product(x, matrix, None)
    assert torch.equal(whole, quantized.product(x, matrix, None))
    for num_rows in (1, 2, 7, 16, 17, 32, 33, 63):
        assert torch.equal(quantized.product(x[-num_rows:], matrix, None), whole[-num_rows:]), num_rows


@needs_gpu
@pytest.mark.parametrize("num_rows", [1, 16, 200])
def test_a_recorded_product_says_what_a_fresh_one_does(form: Quantization, num_rows: int) -> None:
    codes, scales, minimums = random_parts((576, 1536), form)
    matrix = QuantizedMatrix(codes, scales, minimums, 576, form.group_size)
    x = random(num_rows, 1536, seed=12).to(DEVICE, torch.bfloat16)
    fresh = quantized.product(x, matrix, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = quantized.product(x, matrix, None)
    recorded.zero_()
    graph.replay()
    assert torch.equal(recorded, fresh)


def random_parts(shape: tuple[int, int], form: Quantization) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and minimums of a matrix that the naive twin would take long to read."""
    draw = torch.Generator().manual_seed(13)
    if form.group_size == 0:
        codes = torch.randint(-127, 128, shape, generator=draw, dtype=torch.int8)
        return codes.to(DEVICE), torch.rand(shape[0], generator=draw).to(DEVICE), None
    codes = torch.randint(0, 256, (shape[0] // 2, shape[1]), generator=draw, dtype=torch.uint8)
    scales = torch.rand(shape[0], shape[1] // form.group_size, generator=draw).half()
    return codes.to(DEVICE), scales.to(DEVICE), -8 * scales.to(DEVICE) if form.has_minimums else None
