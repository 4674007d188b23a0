"""The small kernels around the attention against the naive reference: in Triton's interpreter, or on a GPU."""

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="needs the extra `triton`; run by `make test-triton`")

from dijiang_model.config import ModelConfig
from dijiang_model.families.llama import RMSNorm
from dijiang_model.ops import selection
from dijiang_model.ops.triton import around
from dijiang_model.reference import network
from tests.dijiang_model.stepping import assert_close_in_norm
from tests.tiny_models import gpt_neox_config, llama_config

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
pytestmark = [pytest.mark.cuda] if HAS_GPU else []

TOLERANCES = {torch.float32: 5e-7, torch.bfloat16: 2**-7}
"""Of the norm: some roundings in fp32; one of the result to bf16, which the interpreter rounds towards zero."""
WIDTHS = (576, 80, 1)


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 0.5
    return x.to(DEVICE, dtype)


def norm_of(config: ModelConfig, width: int, seed: int, dtype: torch.dtype) -> nn.Module:
    """The family's norm with random parameters."""
    norm: nn.Module
    if config.family == "llama":
        norm = RMSNorm(width, eps=config.norm_eps, dtype=dtype)
        norm.weight = nn.Parameter(random(width, seed=seed, dtype=dtype))
    else:
        norm = nn.LayerNorm(width, eps=config.norm_eps, dtype=dtype)
        norm.weight, norm.bias = (nn.Parameter(random(width, seed=seed + n, dtype=dtype)) for n in range(2))
    return norm.requires_grad_(False)


def expected_norm(config: ModelConfig, norm: nn.Module, x: Tensor) -> Tensor:
    part = {name: one.double().cpu() for name, one in norm.named_parameters()}
    return network._norm(config, part, x.double().cpu())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_sum_and_norm_in_one_pass_equal_the_reference(family: str, dtype: torch.dtype, width: int) -> None:
    config = {"llama": llama_config(), "gpt_neox": gpt_neox_config()}[family]
    norm = norm_of(config, width, 3, dtype)
    x, delta = random(5, width, seed=1, dtype=dtype), random(5, width, seed=2, dtype=dtype)
    total, normed = around.residual_norm(x, delta, norm)
    if HAS_GPU or dtype == torch.float32:
        assert torch.equal(total, x + delta), "the residual stream is what it is without the kernel"
    assert_close_in_norm(total.cpu().float(), x.double().cpu() + delta.double().cpu(), tolerance=TOLERANCES[dtype])
    assert_close_in_norm(normed.cpu().float(), expected_norm(config, norm, total), tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_two_norms_of_the_same_tokens_equal_the_reference(dtype: torch.dtype) -> None:
    config = gpt_neox_config()
    norms = [norm_of(config, 80, seed, dtype) for seed in (3, 7)]
    x = random(3, 80, seed=1, dtype=dtype)
    for found, norm in zip(around.two_norms(x, *norms), norms, strict=True):
        assert_close_in_norm(found.cpu().float(), expected_norm(config, norm, x), tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 341), (2, 1024)])
def test_the_gated_product_equals_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Also of a view with strides of its own, as a fused projection would give."""
    both = random(shape[0], 2 * shape[1], seed=1, dtype=dtype)
    gate, up = both.chunk(2, dim=1)
    x, factor = gate.double().cpu(), up.double().cpu()
    expected = network.ACTIVATIONS["silu"](x) * factor
    assert_close_in_norm(around.gated_product(gate, up).cpu().float(), expected, tolerance=TOLERANCES[dtype])


def test_nothing_is_launched_for_no_tokens() -> None:
    x, norm = random(0, 80, seed=1, dtype=torch.float32), norm_of(gpt_neox_config(), 80, 1, torch.float32)
    assert [len(one) for one in (*around.residual_norm(x, x, norm), *around.two_norms(x, norm, norm))] == [0] * 4
    assert len(around.gated_product(x, x)) == 0


def test_kernels_that_know_no_gradients_serve_nobody_who_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an input or of the norm's parameters; then, and on a CPU, torch computes."""
    monkeypatch.setattr(selection, "has_kernels", lambda device, dtype: True)
    x, norm = random(2, 80, seed=1, dtype=torch.float32), norm_of(gpt_neox_config(), 80, 1, torch.float32)
    assert selection._is_fused(x, x, norm=norm)
    assert not selection._is_fused(x, x.clone().requires_grad_(), norm=norm)
    norm.requires_grad_()
    assert not selection._is_fused(x, x, norm=norm)
    with torch.no_grad():
        assert selection._is_fused(x, x, norm=norm)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_what_a_family_adds_to_its_norms_weights_is_added(dtype: torch.dtype) -> None:
    norm = RMSNorm(80, eps=1e-6, dtype=dtype, offset=1.0)
    norm.weight = nn.Parameter(random(80, seed=3, dtype=dtype), requires_grad=False)
    x, delta = random(5, 80, seed=1, dtype=dtype), random(5, 80, seed=2, dtype=dtype)
    total, normed = around.residual_norm(x, delta, norm)
    wide = RMSNorm(80, eps=1e-6, dtype=torch.float64, offset=1.0)
    wide.weight = nn.Parameter(norm.weight.double(), requires_grad=False)
    assert_close_in_norm(normed.cpu().float(), wide.cpu()(total.double().cpu()), tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize(("num_rows", "width", "num_outputs"), [(3, 576, 16), (1, 1030, 5), (0, 64, 4)])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_product_with_few_rows_widens_what_it_reads(
    dtype: torch.dtype, num_rows: int, width: int, num_outputs: int
) -> None:
    x = random(num_rows, 2 * width, seed=1, dtype=dtype)[:, :width]  # rows that lie apart
    weight = random(num_outputs, width, seed=2, dtype=torch.float32)
    product = around.wide_product(x, weight)
    assert product.dtype == torch.float32
    assert_close_in_norm(product.cpu(), x.double().cpu() @ weight.double().cpu().T, tolerance=5e-6)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("width", WIDTHS)
def test_scores_are_the_nearest_on_their_grid(width: int, dtype: torch.dtype) -> None:
    grid = 1 / 64
    x, weight = random(7, width, seed=1, dtype=dtype), random(3, width, seed=2, dtype=torch.float32)
    bias = random(3, seed=3, dtype=torch.float32)
    found = around.grid_scores(x, weight, bias, grid=grid).double().cpu()
    exact = x.double().cpu() @ weight.double().cpu().T + bias.double().cpu()
    assert torch.equal(found, (found / grid).round() * grid)
    assert (found - exact).abs().max() <= grid / 2 + 1e-5 * exact.abs().max()


def test_a_score_between_two_goes_to_the_even_one_as_torch_does() -> None:
    grid = 1 / 64
    x = torch.tensor([[0.5], [1.5], [2.5], [-0.5], [-1.5], [0.0]], device=DEVICE) * grid
    weight, bias = torch.ones(1, 1, device=DEVICE), torch.zeros(1, device=DEVICE)
    expected = selection.grid_scores(x.cpu().double(), weight.cpu().double(), bias.cpu().double(), grid=grid)
    assert torch.equal(around.grid_scores(x, weight, bias, grid=grid).cpu().double(), expected)
