"""Values by the position in a conversation, counted as a list of all of them would be."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from server.engine.types.position_stats import (
    NOTHING_OBSERVED,
    POSITION_NAMES,
    POSITION_STARTS,
    STEP_BUCKETS_S,
    PositionRecorder,
)

observations = st.lists(
    st.tuples(
        st.one_of(
            st.integers(0, 2**40), st.sampled_from([bound + step for bound in POSITION_STARTS for step in (-1, 0)])
        ),
        st.one_of(st.floats(0, 10), st.sampled_from(STEP_BUCKETS_S)),
        st.integers(1, 3),
    ),
    max_size=30,
)


@given(observations)
def test_every_value_is_in_its_range_of_positions_and_its_bucket(given_values: list[tuple[int, float, int]]) -> None:
    recorder = PositionRecorder(STEP_BUCKETS_S)
    for position, value, times in given_values:
        recorder.observe(position, value, times=times)
    found = recorder.histogram()
    edges = [0, *POSITION_STARTS, 2**63]
    expected = {}
    for number in range(len(POSITION_NAMES)):
        inside = [
            value
            for position, value, times in given_values
            for _ in range(times)
            if edges[number] <= position < edges[number + 1]
        ]
        if inside:
            bounds = [-1.0, *STEP_BUCKETS_S, float("inf")]
            counts = [sum(low < v <= high for v in inside) for low, high in pairwise(bounds)]
            expected[number] = (tuple(counts), sum(inside))
    assert found.positions == tuple(expected)
    assert found.counts == tuple(counts for counts, _ in expected.values())
    assert all(abs(a - b) < 1e-9 * (1 + b) for a, (_, b) in zip(found.sums, expected.values(), strict=True))


def test_nothing_observed_is_an_empty_histogram() -> None:
    assert PositionRecorder(STEP_BUCKETS_S).histogram() == NOTHING_OBSERVED


@given(st.lists(st.integers(0, 2**21), max_size=40), st.floats(0, 1))
def test_a_value_at_many_positions_counts_as_often_as_one_by_one(positions: list[int], value: float) -> None:
    together, apart = PositionRecorder(STEP_BUCKETS_S), PositionRecorder(STEP_BUCKETS_S)
    together.observe_all(positions, value)
    for position in positions:
        apart.observe(position, value)
    assert together.histogram().counts == apart.histogram().counts
