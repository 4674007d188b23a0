"""Numbers that depend on seed and place alone."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from server.engine.sampling.randomness import uniform


@given(seed=st.integers(-(2**70), 2**70), index=st.integers(0, 2**63))
def test_every_number_lies_in_the_unit_interval_and_can_be_had_again(seed: int, index: int) -> None:
    assert 0 <= uniform(seed, index) < 1
    assert uniform(seed, index) == uniform(seed, index)


def test_numbers_are_spread_evenly_along_outputs_and_along_seeds() -> None:
    num = 2_000
    for numbers in ([uniform(7, index) for index in range(num)], [uniform(seed, 0) for seed in range(num)]):
        assert abs(sum(numbers) / num - 0.5) < 0.03  # 4.6 standard errors
        for tenth in range(10):
            assert 140 < sum(tenth <= number * 10 < tenth + 1 for number in numbers) < 260
        mean_step = sum(abs(one - other) for one, other in pairwise(numbers)) / num
        assert abs(mean_step - 1 / 3) < 0.03  # of independent numbers


def test_neighbouring_seeds_share_no_numbers_at_shifted_places() -> None:
    """A generator that only added seed and place would repeat one seed's numbers in the next."""
    tables = [{uniform(seed, index) for index in range(200)} for seed in range(20)]
    assert len(set().union(*tables)) == 20 * 200
