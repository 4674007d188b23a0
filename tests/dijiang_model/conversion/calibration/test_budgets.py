"""A state is as large as was asked for at most, and its places are where they save most."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dijiang_model.conversion.calibration.budgets import (
    FEW_PLACES,
    PlaceBudget,
    allocate,
    anchored_config,
    linear_parts_that_pay,
    place_budget,
    with_features,
)
from dijiang_model.errors import ConversionError
from dijiang_model.families import build_model
from tests.tiny_models import HYBRID, PURE, llama_config

CONFIG = llama_config(HYBRID, HYBRID, HYBRID)


def state_bytes(places: torch.Tensor, budget: PlaceBudget) -> int:
    config = anchored_config(CONFIG, places, window=budget.window, sinks=4, value_bits=budget.value_bits)
    return build_model(config, device="meta", dtype=torch.float32).state_spec.bytes_per_slot


@given(st.integers(16_000, 2_000_000))
def test_a_budget_is_used_up_and_never_exceeded(num_bytes: int) -> None:
    budget = place_budget(CONFIG, num_bytes, sinks=4)
    losses = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(num_bytes)).sort(-1, descending=True).values
    anchors = allocate(losses, (0, 10, 100, 1000), num_anchors=budget.num_anchors, most=10_000)
    assert int(anchors.sum()) <= budget.num_anchors
    used = state_bytes(anchors, budget)
    # An anchor takes 48 bytes at most; less than one is left for each head and one more. Aligned are 6 tensors of 3
    # layers: room for that is set aside, and the smallest state, which is counted from, may have had as much of it.
    assert num_bytes - 2 * 3 * 6 * 64 - 7 * 48 <= used <= num_bytes or int(anchors.sum()) == budget.num_anchors


def test_what_is_too_small_names_what_is_enough() -> None:
    with pytest.raises(ConversionError, match="give --state-bytes 9984 or more"):
        place_budget(CONFIG, 5000, sinks=4)
    assert place_budget(CONFIG, 9_984, sinks=4).num_anchors == 0
    with pytest.raises(ConversionError):
        place_budget(CONFIG, 9_983, sinks=4)


def test_what_a_state_holds_is_said_in_words() -> None:
    config = llama_config(HYBRID, HYBRID, num_heads=10, num_kv_heads=5)
    anchors = torch.arange(10).view(2, 5) * 1000
    assert anchored_config(config, anchors, window=64, sinks=4, value_bits=8).memory == (
        "4,568 places a head; one head in ten holds the last 8,068 tokens whole, and chosen ones for longer"
    )
    assert config.memory == "the last 7 tokens exactly"
    assert llama_config(PURE, PURE).memory == "no token exactly"


def test_small_budgets_have_small_windows() -> None:
    windows = [place_budget(CONFIG, num, sinks=4).window for num in (12_000, 24_000, 100_000)]
    assert windows == sorted(windows)
    assert windows[0] == 8
    assert windows[-1] == 64


def test_where_places_are_few_values_have_four_bits() -> None:
    bits = {num: place_budget(CONFIG, num, sinks=4).value_bits for num in (12_000, 100_000, 130_000, 1_000_000)}
    assert bits == {12_000: 4, 100_000: 4, 130_000: 8, 1_000_000: 8}
    budget = place_budget(CONFIG, 130_000, sinks=4)
    assert budget.num_anchors / 6 + budget.window + 4 >= FEW_PLACES


def test_a_linear_part_is_kept_where_it_saves_more_than_the_places_of_its_bytes() -> None:
    placed = anchored_config(with_features(CONFIG, 16), torch.full((3, 2), 100), window=8, sinks=4, value_bits=8)
    losses = torch.tensor([4.0, 3.0, 2.0, 1.0]).expand(3, 2, 4)  # 0.01 for each place
    # 16 features take 2 x 16 x 17 x 4 bytes, which are 45 places of 48 bytes: 0.45 of the two heads' 6 at 100 places.
    saved = torch.tensor([[0.0, 0.0], [0.05, 0.05], [0.2, 0.2]])
    assert linear_parts_that_pay(placed, losses, (0, 100, 200, 300), saved) == [False, False, True]


def test_anchors_go_where_they_save_most_also_behind_a_plateau() -> None:
    losses = torch.tensor([[[9.0, 8.0, 8.0, 0.0], [5.0, 1.0, 0.9, 0.0]]])
    sizes = (0, 10, 20, 30)
    # 4 are saved by the first 10 of the second head, then 0.3 by each of 30 for the first head.
    assert allocate(losses, sizes, num_anchors=15, most=99).tolist() == [[2, 12]]
    assert allocate(losses, sizes, num_anchors=40, most=99).tolist() == [[30, 10]]
    assert allocate(losses, sizes, num_anchors=1000, most=99).tolist() == [[99, 99]]
