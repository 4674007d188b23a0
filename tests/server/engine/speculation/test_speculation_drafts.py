"""Guessing next tokens: what was seen before, how likely it is to come again, and what a row is worth."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.speculation.cost_model import MAX_ROWS, StepCosts
from server.engine.speculation.drafts import OwnTextDrafter, num_confirmed
from server.engine.speculation.index import GAP, MAX_CANDIDATES, MAX_MATCH, TokenHistory
from tests.server.engine.fakes import FREE

NO_ENDS: frozenset[int] = frozenset()


def drafter_of(
    prompt: list[int], *, prediction: tuple[int, ...] = (), end_token_ids: frozenset[int] = NO_ENDS
) -> OwnTextDrafter:
    return OwnTextDrafter(TokenHistory(prompt, prediction=prediction), prompt[-1], end_token_ids=end_token_ids)


class NaiveHistory:
    """All that `TokenHistory` promises, by looking at everything every time."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.match, self.match_length = self._find()

    def push(self, token_id: int) -> None:
        goes_on = self.match_length > 0 and self.tokens[self.match] == token_id
        self.tokens.append(token_id)
        if goes_on:
            self.match, self.match_length = self.match + 1, min(self.match_length + 1, MAX_MATCH)
        else:
            self.match, self.match_length = self._find()

    def _find(self) -> tuple[int, int]:
        places = [place for place in range(len(self.tokens) - 1, 0, -1) if self.tokens[place - 1] == self.tokens[-1]]
        pairs = [place for place in places if self._length(place) > 1]
        if pairs:
            return max(((place, self._length(place)) for place in pairs[:MAX_CANDIDATES]), key=lambda found: found[1])
        return (places[0], 1) if places else (0, 0)

    def _length(self, place: int) -> int:
        length = 0
        while length < min(place, MAX_MATCH) and self.tokens[place - 1 - length] == self.tokens[-1 - length]:
            length += 1
        return length


def assert_same(history: TokenHistory, naive: NaiveHistory) -> None:
    assert history.match_length == naive.match_length
    if naive.match_length:
        expected = [naive.tokens[naive.match + n % (len(naive.tokens) - naive.match)] for n in range(70)]
        assert history.expected == expected[0]
        assert history.continuation(70) == expected
    else:
        assert history.expected is None
        assert history.continuation(70) == []


@given(prompt=st.lists(st.integers(0, 3), max_size=60), output=st.lists(st.integers(0, 3), max_size=60))
def test_matches_are_those_that_a_search_through_everything_finds(prompt: list[int], output: list[int]) -> None:
    history, naive = TokenHistory(prompt), NaiveHistory([*prompt])
    assert_same(history, naive)
    for token_id in output:
        history.push(token_id)
        naive.push(token_id)
        assert_same(history, naive)


@given(tokens=st.lists(st.integers(0, 2**31 - 1), unique=True, min_size=1, max_size=40), num=st.integers(1, 40))
def test_a_text_that_comes_again_is_found_whatever_its_tokens(tokens: list[int], num: int) -> None:
    history = TokenHistory(tokens)
    assert history.match_length == 0
    for length, token_id in enumerate(tokens[:num], start=1):
        history.push(token_id)
        # A single token may be hidden by another one of the same hash.
        assert history.match_length in ({0, 1} if length == 1 else {min(length, MAX_MATCH)})


def test_a_match_up_to_the_end_repeats_itself() -> None:
    assert TokenHistory([7, 1, 2, 3, 1, 2, 3]).continuation(7) == [1, 2, 3, 1, 2, 3, 1]
    assert TokenHistory([7, 7]).continuation(3) == [7, 7, 7]


@given(tokens=st.lists(st.integers(0, 5), max_size=200), max_tokens=st.sampled_from([4, 8, 32]))
def test_a_full_history_keeps_its_last_half_and_true_matches(tokens: list[int], max_tokens: int) -> None:
    history = TokenHistory(max_tokens=max_tokens)
    for count, token_id in enumerate(tokens, start=1):
        history.push(token_id)
        kept = history.tokens.tolist()
        assert min(count, max_tokens // 2) <= len(kept) <= max_tokens
        assert kept == tokens[count - len(kept) : count]
        follows = history.continuation(1)
        if follows:
            before = kept[len(kept) - min(history.match_length, 2) :]
            assert any(kept[at : at + len(before) + 1] == [*before, *follows] for at in range(len(kept)))


def test_memory_does_not_grow_with_the_conversation() -> None:
    history = TokenHistory(max_tokens=256)

    def num_bytes() -> int:
        return sum(sys.getsizeof(part) for part in vars(history).values() if not isinstance(part, int))

    sizes = set()
    for number in range(5_000):
        history.push(number % 997)
        sizes.add(num_bytes())
    assert max(sizes) < 16 * 256 + 1_000


def test_a_short_history_takes_little_memory() -> None:
    assert sum(sys.getsizeof(part) for part in vars(TokenHistory([1, 2, 3])).values()) < 3_000


def test_what_held_before_is_drafted_and_what_failed_is_not() -> None:
    costs = StepCosts({1: 1.0, 2: 1.03, 3: 1.23})
    prompt = [*range(50)]
    trusted, fooled = drafter_of(prompt), drafter_of(prompt)
    for _ in range(30):
        for token_id in (1, 2, 3, 4, 5):
            trusted.push(token_id)
        for token_id in (1, 40, 2, 30, 3, 20):
            fooled.push(token_id)
    trusted.push(1)
    assert trusted.draft(8, costs=costs, num_rows=1)[:4] == (2, 3, 4, 5)
    assert len(trusted.draft(8, costs=costs, num_rows=1)) == 8
    never = drafter_of([1, 2])
    for number in range(1_000):
        never.push(1)
        never.push(10 + number)
    assert len(never.draft(8, costs=costs, num_rows=1)) == 0
    never.push(1)
    assert len(never.draft(8, costs=costs, num_rows=1)) <= 1
    assert len(fooled.draft(8, costs=costs, num_rows=1)) <= len(trusted.draft(8, costs=costs, num_rows=1))


def test_a_sequence_without_drafts_earns_them_back() -> None:
    costs = StepCosts({1: 1.0, 2: 1.1, 3: 1.3})
    drafter = drafter_of([1])
    for number in range(300):
        drafter.push(1)
        drafter.push(10 + number)
    drafter.push(1)
    assert drafter.draft(8, costs=costs, num_rows=1) == ()
    for _ in range(40):
        for token_id in (2, 3, 1):
            drafter.push(token_id)
    assert len(drafter.draft(8, costs=costs, num_rows=1)) == 8


def test_nothing_is_drafted_from_an_end_token_on() -> None:
    drafter = drafter_of([1, 2, 3, 99, 4, 1, 2], end_token_ids=frozenset({99}))
    assert drafter.draft(8, costs=FREE, num_rows=1) == (3,)
    assert drafter_of([1, 2, 3]).draft(8, costs=FREE, num_rows=1) == ()


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_no_more_is_drafted_than_asked_for(num_drafts: int) -> None:
    drafter = drafter_of([1, 2, 3, 4, 5, 6, 1, 2])
    assert drafter.draft(num_drafts, costs=FREE, num_rows=1) == (3, 4, 5)[:num_drafts]


def test_rows_are_dearer_in_company() -> None:
    costs = StepCosts({1: 1.0, 2: 1.03, 3: 1.23})
    lengths = [
        len(drafter_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]).draft(8, costs=costs, num_rows=rows))
        for rows in (1, 4, 16, 256)
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1] == 0


def test_drafts_fill_the_tiles_in_which_rows_are_multiplied() -> None:
    costs = StepCosts({1: 1.0, 2: 1.6, 3: 1.6, 4: 1.6, 5: 3.0, 6: 3.0, 7: 3.0, 8: 1.7, 9: 9.0})
    drafter = drafter_of([*range(40)])
    for _ in range(3):
        for token_id in range(40):
            drafter.push(token_id)
    numbers = {most: len(drafter.draft(most, costs=costs, num_rows=1)) for most in range(1, 12)}
    assert {numbers[most] for most in (3, 4, 5, 6)} == {3}
    assert {numbers[most] for most in (7, 8, 9, 10, 11)} == {7}


def test_costs_between_and_beyond_what_is_known_lie_on_straight_lines() -> None:
    costs = StepCosts({1: 1.0, 2: 1.5, 4: 2.0})
    assert [costs.step(rows) for rows in (1, 2, 3, 4, 6)] == pytest.approx([1.0, 1.5, 1.75, 2.0, 2.5])
    assert costs.step(MAX_ROWS + 40) - costs.step(MAX_ROWS) == pytest.approx(40 * 0.25)


def test_costs_are_learned_from_the_steps_that_are_taken() -> None:
    costs = StepCosts({1: 1.0, 2: 1.2, 8: 3.0})
    for _ in range(40):
        costs.observe(1, 0.02)
        costs.observe(8, 0.03)
    assert costs.step(8) / costs.step(1) == pytest.approx(1.5, rel=0.15)
    assert 1.0 < costs.step(2) / costs.step(1) < 1.3, "as known beforehand"


def test_a_price_that_was_not_seen_for_long_is_known_beforehand_again() -> None:
    costs = StepCosts({1: 1.0, 8: 1.5})
    costs.observe(1, 0.02)
    costs.observe(8, 1.0)
    dear = costs.step(8) / costs.step(1)
    assert 1.5 < dear < 3.0, "one step that was held up counts twice what it should have taken"
    for _ in range(5_000):
        costs.observe(1, 0.02)
    assert costs.step(8) / costs.step(1) == pytest.approx(1.5, rel=0.05)


@given(st.lists(st.tuples(st.integers(1, 200), st.floats(1e-6, 10.0)), max_size=60))
def test_costs_are_positive_whatever_is_measured(observed: list[tuple[int, float]]) -> None:
    costs = StepCosts({1: 1.0, 2: 1.2})
    for rows, seconds in observed:
        costs.observe(rows, seconds)
    assert all(costs.step(rows) > 0 for rows in range(1, MAX_ROWS + 20))


def pushed(history: TokenHistory, *tokens: int) -> TokenHistory:
    for token_id in tokens:
        history.push(token_id)
    return history


def test_a_prediction_is_followed_from_its_beginning_to_its_end() -> None:
    history = TokenHistory([1, 2, 3], prediction=(10, 11, 12, 13))
    assert history.is_predicted
    assert history.continuation(9) == [10, 11, 12, 13]
    assert pushed(history, 10, 11).continuation(9) == [12, 13]
    assert pushed(history, 12, 13).continuation(9) == []
    assert not history.is_predicted


@pytest.mark.parametrize(
    ("output", "follows"),
    [
        ((10, 11, 50, 13), [14, 15, 16]),
        ((10, 11, 50, 51, 52, 13), [14, 15, 16]),
        ((10, 11, 50, 12), [13, 14, 15, 16]),
        ((10, 14), [15, 16]),
        ((50, 10), [11, 12, 13, 14, 15, 16]),
    ],
    ids=["a token replaced", "replaced by three", "inserted", "deleted", "something before it"],
)
def test_an_output_comes_back_to_its_prediction_with_one_token(output: tuple[int, ...], follows: list[int]) -> None:
    history = pushed(TokenHistory([1, 2, 3], prediction=tuple(range(10, 17))), *output)
    assert history.is_predicted
    assert history.continuation(9) == follows


def test_of_equal_places_in_a_prediction_the_nearest_is_taken() -> None:
    lines = tuple(token for number in range(20, 40) for token in (7, 8, number, 9))
    history = pushed(TokenHistory([1], prediction=lines), *lines[:41], 50)
    assert history.match_length == 0
    assert pushed(history, 30).continuation(3) == [9, 7, 8]


def test_what_is_longer_elsewhere_goes_before_the_prediction() -> None:
    history = TokenHistory([1, 2, 3, 4, 5], prediction=(9, 4, 8))
    assert pushed(history, 2, 3, 4).continuation(1) == [5]
    assert not history.is_predicted


@given(
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    prediction=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    output=st.lists(st.integers(0, 3), max_size=120),
    max_tokens=st.sampled_from([4, 16, 64]),
)
def test_no_draft_reaches_beyond_a_prediction_and_every_match_is_true(
    prompt: list[int], prediction: list[int], output: list[int], max_tokens: int
) -> None:
    history = TokenHistory(prompt, prediction=prediction, max_tokens=max_tokens)
    assert history.continuation(99) == prediction
    for number, token_id in enumerate(output, start=1):
        history.push(token_id)
        found = history.continuation(8)
        assert GAP not in found
        assert len(found) <= 8
        if found:
            kept = history.tokens.tolist()
            before = kept[len(kept) - min(history.match_length, 2, number) :]
            assert any(kept[at : at + len(before) + 1] == [*before, found[0]] for at in range(len(kept)))
        else:
            assert history.expected is None


def test_a_copy_of_a_history_goes_its_own_way() -> None:
    history = TokenHistory([1, 2, 3, 1, 2], prediction=(5, 6, 7))
    other = pushed(history.copy(), 1, 2)
    assert other.continuation(1) == [3]
    assert history.continuation(3) == [5, 6, 7]
    assert pushed(history, 5).continuation(3) == [6, 7]


def test_a_prediction_is_trusted_until_it_proves_wrong() -> None:
    costs = StepCosts({1: 1.0, 2: 1.2, 8: 1.6})
    prediction = tuple(range(100, 200))
    drafter = drafter_of([1, 2, 3], prediction=prediction)
    assert drafter.follows_prediction
    assert len(drafter.draft(7, costs=costs, num_rows=1)) == 7
    for number in range(60):
        drafter.push(100 + number)
        drafter.push(1000 + number)
    drafter.push(160)
    assert drafter.draft(7, costs=costs, num_rows=1) == ()


@given(
    drafts=st.lists(st.integers(0, 2), max_size=6),
    sampled=st.lists(st.integers(0, 2), min_size=7, max_size=7),
    faults=st.lists(st.booleans(), min_size=7, max_size=7),
)
def test_what_stands_is_what_single_steps_would_have_given(
    drafts: list[int], sampled: list[int], faults: list[bool]
) -> None:
    rows = len(drafts) + 1
    count = num_confirmed(drafts, sampled[:rows], faults[:rows])
    assert 1 <= count <= rows
    assert sampled[: count - 1] == drafts[: count - 1]
    assert not any(faults[: count - 1])
    if count > 1:
        assert not faults[count - 1], "the next step finds it"
    if count < rows and not faults[count - 1] and not faults[count]:
        assert sampled[count - 1] != drafts[count - 1]
