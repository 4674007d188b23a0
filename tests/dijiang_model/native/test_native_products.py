"""fp32 products in the compiled kernels: every width and number of rows, in panels and out of them."""

import ctypes
from ctypes import CDLL

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dijiang_model.native.library import VARIANTS, load_library, load_variant
from dijiang_model.native.structures import Matrix

pytestmark = pytest.mark.skipif(load_library() is None, reason="the kernels were not built: no compiler at install")


@pytest.fixture(params=list(VARIANTS))
def library(request: pytest.FixtureRequest) -> CDLL:
    library = load_variant(request.param)
    if library is None:
        pytest.skip(f"no {request.param} kernels for this CPU")
    return library


def product(library: CDLL, weight: Tensor, bias: Tensor, x: Tensor, *, threads: int) -> Tensor:
    matrix = Matrix(weight=weight.data_ptr(), bias=bias.data_ptr(), rows=weight.shape[0], columns=weight.shape[1])
    y = torch.full((len(x), len(weight)), torch.nan)
    assert library.dijiang_linear(ctypes.byref(matrix), x.data_ptr(), len(x), y.data_ptr(), threads) == 0
    return y


# 24 and 32 outputs are a panel, of rows longer than 640 columns and of others.
@pytest.mark.parametrize("num_columns", [64, 640, 641, 1000, 1536])
@pytest.mark.parametrize("num_outputs", [1, 24, 32, 101])
def test_rows_in_company_are_those_alone_and_as_exact_as_torch(
    num_columns: int, num_outputs: int, library: CDLL
) -> None:
    generator = torch.Generator().manual_seed(num_columns)
    weight = torch.randn(num_outputs, num_columns, generator=generator)
    bias = torch.randn(num_outputs, generator=generator)
    x = torch.randn(37, num_columns, generator=generator)
    alone = torch.cat([product(library, weight, bias, row[None], threads=1) for row in x])
    exact = functional.linear(x.double(), weight.double(), bias.double())
    assert torch.allclose(alone.double(), exact, rtol=0, atol=2e-6 * num_columns**0.5 * 4)
    for num_rows in (2, 3, 7, 8, 15, 16, 17, 24, 31, 37):
        for threads in (1, 3):
            assert torch.equal(product(library, weight, bias, x[:num_rows], threads=threads), alone[:num_rows])
