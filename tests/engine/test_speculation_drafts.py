"""Guessing next tokens: what was seen before, how likely it is to come again, and what a row is worth."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.speculation_drafts import Drafter, RowPrice, num_confirmed
from server.engine.speculation_index import MAX_CANDIDATES, MAX_MATCH, TokenHistory

FREE = RowPrice(0.0, 0.0, 0.0)
NO_ENDS: frozenset[int] = frozenset()


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
    price = RowPrice(0.03, 0.2, 0.2)
    prompt = [*range(50)]
    trusted, fooled = Drafter(prompt, end_token_ids=NO_ENDS), Drafter(prompt, end_token_ids=NO_ENDS)
    for _ in range(30):
        for token_id in (1, 2, 3, 4, 5):
            trusted.push(token_id)
        for token_id in (1, 40, 2, 30, 3, 20):
            fooled.push(token_id)
    trusted.push(1)
    assert trusted.draft(8, price=price, num_rows=1)[:4] == (2, 3, 4, 5)
    assert len(trusted.draft(8, price=price, num_rows=1)) == 8
    never = Drafter([1, 2], end_token_ids=NO_ENDS)
    for number in range(1_000):
        never.push(1)
        never.push(10 + number)
    assert len(never.draft(8, price=price, num_rows=1)) == 0
    never.push(1)
    assert len(never.draft(8, price=price, num_rows=1)) <= 1
    assert len(fooled.draft(8, price=price, num_rows=1)) <= len(trusted.draft(8, price=price, num_rows=1))


def test_a_sequence_without_drafts_earns_them_back() -> None:
    price = RowPrice(0.1, 0.2, 0.2)
    drafter = Drafter([1], end_token_ids=NO_ENDS)
    for number in range(300):
        drafter.push(1)
        drafter.push(10 + number)
    drafter.push(1)
    assert drafter.draft(8, price=price, num_rows=1) == ()
    for _ in range(40):
        for token_id in (2, 3, 1):
            drafter.push(token_id)
    assert len(drafter.draft(8, price=price, num_rows=1)) == 8


def test_nothing_is_drafted_from_an_end_token_on() -> None:
    drafter = Drafter([1, 2, 3, 99, 4, 1, 2], end_token_ids=frozenset({99}))
    assert drafter.draft(8, price=FREE, num_rows=1) == (3,)
    assert Drafter([1, 2, 3], end_token_ids=NO_ENDS).draft(8, price=FREE, num_rows=1) == ()


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_no_more_is_drafted_than_asked_for(num_drafts: int) -> None:
    drafter = Drafter([1, 2, 3, 4, 5, 6, 1, 2], end_token_ids=NO_ENDS)
    assert drafter.draft(num_drafts, price=FREE, num_rows=1) == (3, 4, 5)[:num_drafts]


def test_rows_are_dearer_in_company() -> None:
    price = RowPrice(second=0.03, further=0.2, beyond=0.2)
    assert price.step(1) == 1.0
    assert price.step(4) == pytest.approx(1.43)
    assert RowPrice(0.0, 0.1, 0.5).step(10) == pytest.approx(1.0 + 6 * 0.1 + 2 * 0.5)
    chances = [price.least_chance(num_rows=rows, num_tokens=rows) for rows in (1, 2, 4, 16, 256)]
    assert chances == sorted(chances)
    assert chances[0] == pytest.approx(0.03)
    assert 0.9 < chances[-1] < 1.0
    drafter = Drafter([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2], end_token_ids=NO_ENDS)
    lengths = [len(drafter.draft(8, price=price, num_rows=rows)) for rows in (1, 4, 16, 256)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1] == 0


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
