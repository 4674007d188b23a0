"""Drawing by Triton's kernel against torch's sorts: in Triton's interpreter, or on a GPU."""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the extra `triton`; run by `make test-triton`")

import triton.language as tl
from triton.runtime import interpreter

from dijiang_model.ops import selection
from dijiang_model.ops.drawing import Draws
from dijiang_model.ops.torch import drawing as torch_drawing
from dijiang_model.ops.triton import drawing

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
pytestmark = [pytest.mark.cuda] if HAS_GPU else []
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no CUDA device")

ROUNDING = 1e-5
"""Of the total mass: nearer to an edge than this, an exponential rounded otherwise may point at the next token."""
LANES = 16
"""Of a tile, in the interpreter: a row of some hundred logits then is several tiles, the last one in part."""
INF = math.inf


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter looks through the whole language whenever a kernel calls a helper; here once."""
    if HAS_GPU:
        yield
        return
    patch_language, patched = interpreter._patch_lang, {}

    def patch_once(function: object) -> object:
        modules = frozenset(id(one) for one in function.__globals__.values() if one is tl or one is tl.core)
        if modules not in patched:
            patched[modules] = patch_language(function)
        return SimpleNamespace(restore=lambda: None)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(drawing, "LANES", LANES)
    yield
    for scope in reversed(patched.values()):
        scope.restore()


def logits_of(num_rows: int, size: int, *, seed: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn((num_rows, size), generator=torch.Generator().manual_seed(seed))


def reals(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draws_of(num_rows: int, size: int, seed: int) -> Draws:
    """Random numbers for every filter, each off in some rows."""
    random = torch.Generator().manual_seed(seed)

    def uniforms() -> Tensor:
        return torch.rand(num_rows, dtype=torch.float64, generator=random)

    off = uniforms() < 0.3
    top_k = torch.randint(1, size + 1, (num_rows,), generator=random).div(uniforms().mul(20).add(1)).long().clamp(min=1)
    return Draws(
        uniforms=uniforms(),
        temperatures=uniforms() * 2 + 0.1,
        min_p=(uniforms() * 0.1).masked_fill_(off.roll(1), 0.0),
        top_k=top_k.masked_fill_(off.roll(2), size),
        max_top_k=size,
        top_p=uniforms().masked_fill_(off.roll(3), 2.0),
    )


def on_device(draws: Draws) -> Draws:
    names = ("uniforms", "temperatures", "min_p", "top_k", "top_p")
    return replace(draws, **{name: one.to(DEVICE) for name in names if (one := getattr(draws, name)) is not None})


def drawn(logits: Tensor, draws: Draws, *, is_checked: bool = False) -> list[int]:
    return drawing.drawn_tokens(logits.to(DEVICE), on_device(draws), is_checked=is_checked).tolist()


def likely(logits: Tensor, draws: Draws) -> list[set[int]]:
    """Of each row, the tokens that torch draws for its uniform number and for those within rounding of it."""
    near = [(draws.uniforms + shift).clamp(0.0, 1.0 - 2**-53) for shift in (-ROUNDING, 0.0, ROUNDING)]
    return [
        set(tokens)
        for tokens in zip(
            *(torch_drawing.drawn_tokens(logits, replace(draws, uniforms=one)).tolist() for one in near), strict=True
        )
    ]


def assert_as_in_torch(logits: Tensor, draws: Draws) -> None:
    for row, (token, expected) in enumerate(zip(drawn(logits, draws), likely(logits, draws), strict=True)):
        assert token in expected, row


@pytest.mark.parametrize("size", [1, 7, 64, 150])
def test_any_rows_draw_the_tokens_of_torchs_sorts(size: int) -> None:
    draws = draws_of(20, size, seed=size)
    assert_as_in_torch(logits_of(20, size, seed=1), draws)


@pytest.mark.parametrize("names", [(), ("min_p",), ("top_k",), ("top_p",), ("min_p", "top_p")])
def test_what_no_row_uses_is_left_out(names: tuple[str, ...]) -> None:
    draws = draws_of(6, 100, seed=5)
    off = {name: None for name in ("min_p", "top_k", "top_p") if name not in names}
    assert_as_in_torch(logits_of(6, 100, seed=2), replace(draws, **off))


def all_of(logits: Tensor, **filters: object) -> set[int]:
    """What uniform numbers all over [0, 1) draw from one row."""
    uniforms = torch.linspace(0, 1 - 2**-53, 25, dtype=torch.float64)
    numbers = {name: torch.full((25,), value) for name, value in filters.items()}
    numbers = {name: one if name == "top_k" else one.double() for name, one in numbers.items()}
    draws = Draws(uniforms, **{"temperatures": torch.ones(25, dtype=torch.float64), **numbers}, max_top_k=len(logits))
    rows = logits.expand(25, -1).contiguous()
    tokens = drawn(rows, draws)
    assert tokens == torch_drawing.drawn_tokens(rows, draws).tolist()
    return set(tokens)


def test_equals_are_kept_together() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 1.0, -1.0, 1.0, -0.0])
    assert all_of(logits, top_k=2) == {1, 2, 3, 5}
    assert all_of(logits, top_k=5) == {0, 1, 2, 3, 5, 6}, "zeros of both signs are equals"
    assert all_of(logits, top_p=0.5) == {1, 2, 3, 5}
    assert all_of(torch.zeros(20), top_p=0.3) == set(range(20))
    assert all_of(torch.zeros(20), top_k=1) == set(range(20))


def test_the_first_to_reach_the_share_stays_and_no_other() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log2() * math.log(2)
    two_to_the = torch.tensor([4.0, 3.0, 2.0, 1.0, 1.0]) * math.log(2)
    for one in (logits, two_to_the):
        assert all_of(one, top_p=0.74) == {0, 1}
        assert all_of(one, top_p=0.76) == {0, 1, 2}
        assert all_of(one, top_p=1e-300) == {0}
        assert all_of(one, top_p=0.0) == {0}
        assert all_of(one, top_p=1.0) == {0, 1, 2, 3, 4}


def test_one_token_is_left() -> None:
    logits = logits_of(1, 90, seed=3)[0]
    best = {int(logits.argmax())}
    assert all_of(logits, top_k=1) == best
    assert all_of(logits, min_p=1.0) == best
    assert all_of(logits, temperatures=1e-30) == best
    assert all_of(logits, top_k=1, top_p=0.5, min_p=0.2) == best
    alone = torch.full((90,), -INF)
    alone[70] = -3.0
    assert all_of(alone) == all_of(alone, top_k=5, top_p=0.9) == {70}


def test_tokens_that_may_not_come_never_do() -> None:
    logits = logits_of(1, 90, seed=4)[0].masked_fill_(torch.arange(90) % 9 > 0, -INF)
    every = set(range(0, 90, 9))
    assert all_of(logits, temperatures=1e30) == every
    assert all_of(logits, temperatures=1e30, top_k=50, top_p=1.0) == every
    assert all_of(logits, top_k=3) <= {int(token) for token in logits.topk(3).indices}


def test_rows_that_have_no_weights_get_the_last_token() -> None:
    logits = torch.zeros(4, 40)
    logits[0], logits[1], logits[2, 5], logits[3, 7] = math.nan, -INF, INF, math.nan
    draws = Draws(*torch.full((2, 4), 0.5, dtype=torch.float64), top_k=torch.full((4,), 3), max_top_k=3)
    assert drawn(logits, draws) == torch_drawing.drawn_tokens(logits, draws).tolist() == [39] * 4


def test_a_step_as_the_model_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy rows beside drawn ones, the first of equals; rows that are not finite are told."""
    logits = logits_of(8, 70, seed=6)
    logits[1, 60] = logits[1, 20] = 50.0
    logits[3, 69], logits[4, 1], logits[5, 1], logits[6, 2] = math.nan, INF, -INF, -INF
    draws = draws_of(8, 70, seed=7)
    draws.temperatures[torch.tensor([0, 1, 5])] = 0.0
    tokens = drawn(logits, draws, is_checked=True)
    assert tokens == selection.chosen_tokens(logits, draws, is_greedy=False).tolist()
    assert tokens[:2] == [int(logits[0].argmax()), 20]
    assert tokens[3:7] == [-1] * 4
    monkeypatch.setattr(selection, "has_kernels", lambda device, dtype: True)
    launched = selection.chosen_tokens(logits.to(DEVICE), on_device(draws), is_greedy=False)
    assert (launched.tolist(), launched.dtype) == (tokens, torch.int64)


def test_the_selection_launches_the_kernel_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Draws] = []
    monkeypatch.setattr(selection, "has_kernels", lambda device, dtype: True)
    monkeypatch.setattr(drawing, "drawn_tokens", lambda logits, draws: calls.append(draws))
    logits, plain = torch.zeros(1, 5), Draws(reals(0.5), reals(1.0))
    selection.drawn_tokens(logits, plain)
    assert calls == [plain]
    assert selection.drawn_tokens(logits, replace(plain, typical_p=reals(0.5))).tolist() == [2]


@needs_gpu
@pytest.mark.parametrize("size", [50_257, 151_936])
def test_rows_of_true_size_draw_the_same_token_every_time_and_in_any_company(size: int) -> None:
    logits, draws = logits_of(300, size, seed=8), draws_of(300, size, seed=9)
    assert_as_in_torch(logits, draws)
    tokens = drawn(logits, draws)
    assert drawn(logits, draws) == tokens
    for row in (0, 7, 299):
        alone = {
            name: one[row : row + 1] for name in draws.__slots__ if isinstance(one := getattr(draws, name), Tensor)
        }
        assert drawn(logits[row : row + 1], replace(draws, **alone)) == tokens[row : row + 1]


@needs_gpu
def test_a_recorded_draw_says_what_a_fresh_one_does() -> None:
    logits, draws = logits_of(64, 50_257, seed=10).cuda(), on_device(draws_of(64, 50_257, seed=11))
    fresh = drawing.drawn_tokens(logits, draws)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = drawing.drawn_tokens(logits, draws)
    recorded.zero_()
    graph.replay()
    assert torch.equal(recorded, fresh)
