"""Who gives way in a segment, by counting on the device, against the naive twin: equal to the last place and step."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="needs the extra `triton`; run by `make test-triton`")

from dijiang_model.config import AnchorConfig
from dijiang_model.ops.layout import PrefillLayout
from dijiang_model.ops.torch.places import PlaceTable, place_table, segment_evictions
from dijiang_model.ops.triton.anchored_prefill import CANDIDATES, STEPS, find_evictions
from tests.dijiang_model.ops.triton.test_triton_attention import DEVICE, HAS_GPU, HYBRID

pytestmark = [pytest.mark.cuda] if HAS_GPU else []
AGES = (0.0, 0.02, 5e-4)


@dataclass(slots=True)
class Places:
    """Shared scores and positions [G, J] of a sequence of which `num_seen` tokens came; what holds none is noise."""

    table: PlaceTable
    scores: Tensor
    positions: Tensor
    num_seen: int = 0

    @classmethod
    def empty(cls, anchors: AnchorConfig, sinks: int) -> "Places":
        table = place_table(replace(HYBRID, sinks=sinks, anchors=anchors), DEVICE)
        noise = torch.full(table.flat.shape, torch.nan, device=DEVICE)
        noise[:, ::2] = torch.inf
        return cls(table, noise, torch.randint_like(table.flat, -(2**31), 2**31).int())

    def take(self, scores: Tensor) -> None:
        """A segment with scores [G, T]: the device finds what the host does, and its tokens take their places."""
        num_tokens, table = scores.shape[1], self.table
        new = torch.arange(self.num_seen, self.num_seen + num_tokens, dtype=torch.int32, device=DEVICE)
        candidate_scores = torch.cat([self.scores, scores.to(DEVICE)], 1)
        candidate_positions = torch.cat([self.positions, new.expand(len(scores), -1)], 1)
        # Two segments of a step: a part of this one, and the whole.
        lengths, columns = (1 + num_tokens // 3, num_tokens), len(table.columns)
        positions = torch.cat([new[:length].long() for length in lengths])
        layout = PrefillLayout(positions, torch.arange(2, device=DEVICE), lengths)
        scored, placed = (
            [candidates[:, : columns + length] for length in lengths]
            for candidates in (candidate_scores, candidate_positions)
        )
        packed = [torch.cat([one.flatten() for one in ones]) for ones in (scored, placed)]
        found = find_evictions(packed[0], packed[1], table, layout=layout)
        times = found.times.split([len(scores) * (columns + length) for length in lengths])
        losers = found.losers.split([len(scores) * length for length in lengths])
        for n in range(2):
            expected = segment_evictions(scored[n], placed[n], table, first=new[:1].long())
            assert torch.equal(times[n].view_as(expected.times), expected.times)
            assert torch.equal(losers[n].view_as(expected.losers), expected.losers)
            assert torch.equal(found.sources[n], expected.sources)
        self.scores = candidate_scores.gather(1, found.sources[1])
        self.positions = candidate_positions.gather(1, found.sources[1])
        self.num_seen += num_tokens

    def held(self) -> tuple[Tensor, Tensor]:
        """Scores and positions, zeros where nothing is held."""
        holds = self.table.holds(torch.tensor([self.num_seen], device=DEVICE))[0]
        return torch.where(holds, self.scores, 0.0), torch.where(holds, self.positions, 0)


def random_scores(num_heads: int, num_tokens: int, *, num_levels: int, seed: int) -> Tensor:
    """[G, T] fp32 of so many levels on the grid, the lowest -inf: many are equal."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(num_levels, (num_heads, num_tokens), generator=generator)
    return torch.where(level == 0, -torch.inf, level / 64)


@settings(max_examples=60)
@given(
    heads=st.lists(st.tuples(st.integers(3, 9), st.sampled_from((0, 0, 1, 2, 5, 20))), min_size=1, max_size=3),
    sinks=st.integers(0, 4),
    age=st.sampled_from(AGES),
    cuts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    num_levels=st.sampled_from((1, 2, 4, 40)),
    seed=st.integers(0, 99),
)
def test_the_device_finds_what_the_host_does_however_a_prompt_is_cut(
    heads: list[tuple[int, int]], sinks: int, age: float, cuts: list[int], num_levels: int, seed: int
) -> None:
    windows = tuple(window for window, _ in heads)
    anchors = AnchorConfig(tuple(sinks + window + limit for window, limit in heads), windows, age=age)
    scores = random_scores(len(heads), sum(cuts), num_levels=num_levels, seed=seed)
    whole, cut = Places.empty(anchors, sinks), Places.empty(anchors, sinks)
    whole.take(scores)
    for piece in scores.split(cuts, 1):
        cut.take(piece)
    for one, other in zip(whole.held(), cut.held(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("num_levels", [3, 500])
def test_segments_of_several_blocks(age: float, num_levels: int) -> None:
    windows, sinks = (30, 70, 11), 4
    places = Places.empty(AnchorConfig((sinks + 30 + 150, sinks + 70, sinks + 11 + 1), windows, age=age), sinks)
    lengths = (1, 2 * STEPS, 3 * STEPS + 7, 5)
    assert sum(lengths) > 4 * CANDIDATES
    for piece in random_scores(3, sum(lengths), num_levels=num_levels, seed=7).split(lengths, 1):
        places.take(piece)


@pytest.mark.parametrize("falls", [False, True])
def test_one_place_that_every_token_takes_and_one_that_none_takes(falls: bool) -> None:
    """The longest chain of tokens that follow each other in a place, and the shortest."""
    scores = torch.arange(100.0).expand(2, -1)
    places = Places.empty(AnchorConfig((5, 4), (4, 3), age=0.0), 0)
    for piece in (-scores if falls else scores).split((3, 90, 7), 1):
        places.take(piece)
