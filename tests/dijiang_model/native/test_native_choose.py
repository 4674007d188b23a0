"""Greedy choices of the compiled kernels against their naive twin."""

import math
from ctypes import CDLL

import pytest
import torch

from dijiang_model.native.choose import NOT_FINITE, greedy_tokens
from dijiang_model.native.library import VARIANTS, load_library, load_variant
from dijiang_model.reference.choosing import greedy_token

pytestmark = pytest.mark.skipif(load_library() is None, reason="the kernels were not built: no compiler at install")

WIDTHS = (1, 3, 15, 16, 17, 63, 64, 65, 127, 500, 4099)


@pytest.fixture(params=VARIANTS)
def library(request: pytest.FixtureRequest) -> CDLL:
    found = load_variant(request.param)
    if found is None:
        pytest.skip("this processor does not run it")
    return found


@pytest.mark.parametrize("width", WIDTHS)
def test_every_row_gets_the_first_of_its_largest_logits(library: CDLL, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn((9, width), generator=generator)
    rounded = (rows * 2).round()  # many equal ones
    for logits in (rows, rounded, -rounded.abs(), torch.full_like(rows, -1e30)):
        assert greedy_tokens(logits, library).tolist() == [greedy_token(row) for row in logits]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_with_any_number_that_is_not_finite_gets_no_token_and_the_others_theirs(
    library: CDLL, width: int, value: float
) -> None:
    logits = torch.randn((width, width), generator=torch.Generator().manual_seed(1))[:70]
    for row in range(0, len(logits), 2):
        logits[row, width - 1 - row] = value
    expected = [greedy_token(row) for row in logits]
    assert expected.count(None) == len(range(0, len(logits), 2))
    chosen = greedy_tokens(logits, library).tolist()
    assert chosen == [NOT_FINITE if token is None else token for token in expected]


def test_rows_of_a_larger_matrix_are_taken_where_they_lie(library: CDLL) -> None:
    wide = torch.randn((4, 130), generator=torch.Generator().manual_seed(2))
    assert greedy_tokens(wide[:, :65], library).tolist() == wide[:, :65].argmax(dim=-1).tolist()


def test_the_largest_finite_numbers_are_no_fault(library: CDLL) -> None:
    logits = torch.full((1, 40), torch.finfo(torch.float32).max)
    assert greedy_tokens(logits, library).tolist() == [0]
