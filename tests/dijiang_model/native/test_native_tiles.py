"""Products by the matrix unit: int8 as integers add up, bf16 the same in any company; odd sizes of everything."""

import ctypes
from ctypes import CDLL

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dijiang_model.native.library import load_variant
from dijiang_model.native.structures import Matrix
from dijiang_model.reference.halves import half_product_naive
from dijiang_model.reference.quantization import code_product_naive

# Not multiples of a tile's 16 outputs and rows or of its 64 bytes, and such; several panels of outputs.
COLUMNS, OUTPUTS, ROWS = (1, 31, 33, 64, 100, 576), (1, 15, 16, 33, 64, 151), (1, 2, 7, 16, 17, 33, 50)


@pytest.fixture(scope="module")
def library() -> CDLL:
    library = load_variant("amx")
    if library is None:
        pytest.skip("NOT TESTED: this CPU has no AMX, or the kernels for it were not built")
    return library


def product(library: CDLL, matrix: Matrix, x: Tensor, *, threads: int = 1) -> Tensor:
    y = torch.full((len(x), matrix.rows), torch.nan)
    assert library.dijiang_linear(ctypes.byref(matrix), x.data_ptr(), len(x), y.data_ptr(), threads) == 0
    return y


class Codes:
    """An int8 matrix of random codes, as the kernels read it, and what the naive twin reads."""

    def __init__(self, outputs: int, columns: int, *, largest: int = 127) -> None:
        self.codes = torch.randint(-largest, largest + 1, (outputs, columns), dtype=torch.int8)
        self.scales, self.bias = torch.rand(outputs) + 0.1, torch.randn(outputs)
        self._padded = functional.pad(self.codes, (0, -columns % 64))
        self.matrix = Matrix(
            codes=self._padded.data_ptr(),
            scales=self.scales.data_ptr(),
            bias=self.bias.data_ptr(),
            rows=outputs,
            columns=columns,
        )

    def exact(self, x: Tensor) -> Tensor:
        return code_product_naive(self.codes, self.scales, x) + self.bias


def halves(weight: Tensor) -> Matrix:
    return Matrix(halves=weight.data_ptr(), rows=weight.shape[0], columns=weight.shape[1])


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_int8_products_are_those_of_integers_to_the_bit(outputs: int, columns: int, library: CDLL) -> None:
    torch.manual_seed(columns)
    weight, x = Codes(outputs, columns), torch.randn(max(ROWS), columns)
    exact = weight.exact(x)
    for num_rows in ROWS:
        for threads in (1, 3):
            assert torch.equal(product(library, weight.matrix, x[:num_rows], threads=threads), exact[:num_rows])


@pytest.mark.parametrize("num_rows", [1, 5, 18])
def test_int8_sums_beyond_32_bits_are_exact(num_rows: int, library: CDLL) -> None:
    weight, x = Codes(20, 1000), torch.ones(num_rows, 1000)
    weight.codes.fill_(127)
    weight._padded[:, :1000] = 127
    weight._padded[1, :500] = weight.codes[1, :500] = -127
    assert (32767 * 127 * 1000) > 2**31
    assert torch.equal(product(library, weight.matrix, x), weight.exact(x))


def test_int8_rows_that_are_not_finite_are_nan_in_their_own_row(library: CDLL) -> None:
    weight, x = Codes(5, 70), torch.randn(20, 70)
    clean = product(library, weight.matrix, x)
    x[1, 3], x[17, 69], x[4] = torch.nan, -torch.inf, 0
    y = product(library, weight.matrix, x)
    assert y[[1, 17]].isnan().all()
    assert torch.equal(y[4], weight.bias)
    others = [n for n in range(20) if n not in (1, 4, 17)]
    assert torch.equal(y[others], clean[others])
    assert product(library, weight.matrix, x[1:2]).isnan().all()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_bf16_products_are_the_same_in_any_company(outputs: int, columns: int, library: CDLL) -> None:
    torch.manual_seed(columns)
    weight, x = torch.randn(outputs, columns).bfloat16(), torch.randn(max(ROWS), columns)
    alone = torch.cat([product(library, halves(weight), row[None]) for row in x])
    exact = functional.linear(x.bfloat16().double(), weight.double())
    assert torch.allclose(alone.double(), exact, rtol=0, atol=1e-6 * columns)
    for num_rows in ROWS:
        for threads in (1, 3):
            assert torch.equal(product(library, halves(weight), x[:num_rows], threads=threads), alone[:num_rows])


@given(
    num_rows=st.integers(1, 40),
    columns=st.integers(1, 130),
    outputs=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_any_size_of_either_is_as_the_naive_twins_compute_it(
    num_rows: int, columns: int, outputs: int, seed: int, library: CDLL
) -> None:
    torch.manual_seed(seed)
    x, codes = torch.randn(num_rows, columns), Codes(outputs, columns)
    assert torch.equal(product(library, codes.matrix, x, threads=2), codes.exact(x))
    weight = torch.randn(outputs, columns).bfloat16()
    first = half_product_naive(weight[:2], x[:2])
    assert torch.allclose(product(library, halves(weight), x)[:2, :2].double(), first, rtol=0, atol=1e-6 * columns)
