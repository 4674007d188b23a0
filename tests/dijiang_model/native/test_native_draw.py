"""Drawn tokens of the compiled kernels against their naive twin."""

import itertools
import math
from ctypes import CDLL

import pytest
import torch
from torch import Tensor

from dijiang_model.native.draw import sampled_tokens
from dijiang_model.native.library import VARIANTS, load_library, load_variant
from dijiang_model.native.structures import DrawRules
from dijiang_model.reference.drawing import sampled_token

pytestmark = pytest.mark.skipif(load_library() is None, reason="the kernels were not built: no compiler at install")

UNIFORMS = (0.0, 0.03, 0.31, 0.5, 0.77, 0.98, 1 - 2**-53)


@pytest.fixture(params=VARIANTS)
def library(request: pytest.FixtureRequest) -> CDLL:
    found = load_variant(request.param)
    if found is None:
        pytest.skip("this processor does not run it")
    return found


def rules(
    *,
    uniform: float,
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> DrawRules:
    return DrawRules(uniform, temperature, min_p, 2**40 if top_k is None else top_k, 2.0 if top_p is None else top_p)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("width", [1, 3, 15, 16, 17, 64, 511, 513, 1100])
def test_each_row_is_drawn_by_its_own_rules(library: CDLL, width: int) -> None:
    choices = itertools.product((0.4, 1.0, 2.5), (0.0, 0.05), (None, 1, 7, 400), (None, 0.1, 0.6, 0.97))
    wanted = [
        {"uniform": UNIFORMS[number % len(UNIFORMS)], "temperature": t, "min_p": m, "top_k": k, "top_p": p}
        for number, (t, m, k, p) in enumerate(choices)
    ]
    for logits in (noise(len(wanted), width, seed=width), noise(len(wanted), width, seed=1 + width).round()):
        expected = [sampled_token(row, **each) for row, each in zip(logits, wanted, strict=True)]  # type: ignore[arg-type]
        assert sampled_tokens(logits, [rules(**each) for each in wanted], library).tolist() == expected  # type: ignore[arg-type]


def test_equals_are_kept_together(library: CDLL) -> None:
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]).expand(len(UNIFORMS), 5)
    for each in ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.01}, {"top_p": 0.0}, {"min_p": 1.0}):
        drawn = sampled_tokens(logits, [rules(uniform=uniform, **each) for uniform in UNIFORMS], library)
        assert drawn.tolist() == [1, 1, 1, 2, 3, 3, 3]


@pytest.mark.parametrize("spread", [0.01, 3.0, 30.0])
def test_top_p_of_a_whole_vocabulary(library: CDLL, spread: float) -> None:
    logits = noise(1, 32_003, seed=10) / 3 * spread
    for share in (0.0, 0.3, 0.9, 0.9999, 1.0):
        expected = sampled_token(logits[0], uniform=0.77, top_p=share)
        assert int(sampled_tokens(logits, [rules(uniform=0.77, top_p=share)], library)) == expected


def test_what_is_ruled_out_is_never_drawn(library: CDLL) -> None:
    logits = noise(len(UNIFORMS), 200, seed=5)
    logits[:, ::2] = -math.inf
    logits[:, 150:] = -math.inf
    for each in ({}, {"top_k": 150}, {"top_p": 0.99999999}, {"temperature": 1e30}, {"temperature": 1e-30}):
        drawn = sampled_tokens(logits, [rules(uniform=uniform, **each) for uniform in UNIFORMS], library)
        assert all(token % 2 == 1 and token < 150 for token in drawn.tolist())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gets_some_token_and_the_others_theirs(library: CDLL, value: float) -> None:
    logits = noise(6, 70, seed=6)
    expected = [sampled_token(row, uniform=0.6, top_k=40, top_p=0.9) for row in logits]
    logits[1], logits[3, ::3], logits[5, 69] = value, value, math.nan
    drawn = sampled_tokens(logits, [rules(uniform=0.6, top_k=40, top_p=0.9)] * 6, library).tolist()
    assert all(0 <= token < 70 for token in drawn)
    assert drawn[::2] == expected[::2]


def test_neither_company_nor_threads_nor_the_row_before_change_a_row(library: CDLL) -> None:
    logits, threads = noise(20, 700, seed=7), torch.get_num_threads()
    every = [rules(uniform=number / 20, top_p=(None, 0.9)[number % 2]) for number in range(20)]
    alone = [int(sampled_tokens(row[None], [each], library)) for row, each in zip(logits, every, strict=True)]
    sampled_tokens(noise(3, 1300, seed=8), every[:3], library)  # of another vocabulary
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert sampled_tokens(logits, every, library).tolist() == alone
    finally:
        torch.set_num_threads(threads)


def test_rows_of_a_larger_matrix_are_taken_where_they_lie(library: CDLL) -> None:
    wide = noise(4, 130, seed=9)
    expected = [sampled_token(row[:65], uniform=0.4) for row in wide]
    assert sampled_tokens(wide[:, :65], [rules(uniform=0.4)] * 4, library).tolist() == expected
