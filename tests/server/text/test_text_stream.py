"""`TextStream`: for any split of any text and any stop strings, the output is the text up to the first stop."""

import re
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from dijiang_model.text.vocabulary import Vocabulary
from server.text.stream import StopMatcher, TextStream

SPECIAL = 256
BYTES = Vocabulary((*(bytes([byte]) for byte in range(256)), b"<|end|>"), frozenset({SPECIAL}))
FEW_LETTERS = st.text("ab€😀", max_size=40)
STOPS = st.lists(st.text("ab€", min_size=1, max_size=5), max_size=4)


def pieces_vocabulary(pieces: Sequence[bytes]) -> Vocabulary:
    """A vocabulary in which piece number i is token i."""
    return Vocabulary(tuple(pieces), frozenset())


def until_first_stop(text: str, stops: Sequence[str], *, include_stop: bool) -> str:
    """The definition: the stop completed first; of several completed by one character, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[:end] if include_stop else text[: end - max(map(len, found))]
    return text


def run(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.finish()]


@given(data=st.data(), text=FEW_LETTERS, stops=STOPS, include_stop=st.booleans())
def test_any_split_gives_the_text_up_to_the_first_stop(
    data: st.DataObject, text: str, stops: list[str], include_stop: bool
) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=20)))
    pieces = [raw[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    stream = TextStream(pieces_vocabulary(pieces), stop=stops, include_stop=include_stop)
    expected = until_first_stop(text, stops, include_stop=include_stop)
    assert "".join(run(stream, range(len(pieces)))) == expected
    assert stream.stopped == any(stop in text for stop in stops)


@given(text=st.text(max_size=60))
def test_any_text_comes_through_byte_by_byte_without_half_characters(text: str) -> None:
    pieces = run(TextStream(BYTES), list(text.encode()))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(raw=st.binary(max_size=40))
def test_any_bytes_decode_as_if_at_once_but_for_an_incomplete_end(raw: bytes) -> None:
    assert raw.decode("utf-8", "replace").startswith(out := "".join(run(TextStream(BYTES), list(raw))))
    # Two bytes of a surrogate, and they alone, are held back as one character and stand for two replacements.
    is_half_surrogate = raw[-2:-1] == b"\xed" and 0xA0 <= raw[-1] <= 0xBF
    held_back = "\ufffd\ufffd" if is_half_surrogate else "\ufffd"
    assert raw.decode("utf-8", "replace").removeprefix(out) in ("", held_back)


@given(text=FEW_LETTERS, stops=STOPS)
def test_nothing_that_was_released_is_part_of_a_stop_string(text: str, stops: list[str]) -> None:
    stream = TextStream(BYTES, stop=stops)
    out = ""
    for byte in text.encode():
        out += stream.push(byte)
        assert until_first_stop(text, stops, include_stop=False).startswith(out)
        assert not any(stop in out for stop in stops)


def test_only_a_possible_beginning_of_a_stop_is_held_back() -> None:
    stream = TextStream(BYTES, stop=["abc"])
    assert [stream.push(byte) for byte in b"xabxabc!"] == ["x", "", "", "abx", "", "", "", ""]
    assert stream.stopped
    assert stream.num_tokens == 7


def test_what_was_held_back_comes_at_the_end() -> None:
    assert run(TextStream(BYTES, stop=["abc"]), list(b"ab")) == ["", "", "ab"]


def test_special_tokens_are_left_out_unless_wanted() -> None:
    assert "".join(run(TextStream(BYTES), [97, SPECIAL, 98])) == "ab"
    assert "".join(run(TextStream(BYTES, skip_special=False), [97, SPECIAL, 98])) == "a<|end|>b"


def test_a_stop_string_may_lie_across_a_special_token_that_is_left_out() -> None:
    assert "".join(run(TextStream(BYTES, stop=["ab"]), [120, 97, SPECIAL, 98, 99])) == "x"


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    assert "".join(run(TextStream(BYTES, stop=["a"], min_tokens=3), list(b"aaxbaz"))) == "aaxb"


def test_token_ids_outside_the_vocabulary_are_no_text() -> None:
    assert "".join(run(TextStream(BYTES), [97, 257, 10**9, 98])) == "ab"


def test_a_leading_space_is_taken_away_only_at_the_start_of_a_text() -> None:
    words = Vocabulary((b" Hi", b" you", b" "), frozenset(), num_leading_spaces=1)
    assert "".join(run(TextStream(words, at_start=True), [0, 1])) == "Hi you"
    assert "".join(run(TextStream(words, at_start=True), [2, 0])) == " Hi"
    assert "".join(run(TextStream(words), [0, 1])) == " Hi you"


@given(text=st.text("ab", max_size=200), stops=st.lists(st.text("ab", min_size=1, max_size=12), min_size=1, max_size=5))
def test_the_matcher_agrees_with_a_search(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    out = matcher.feed(text) + matcher.flush()
    assert matcher.matched == (re.search("|".join(map(re.escape, stops)), text) is not None)
    assert out == until_first_stop(text, stops, include_stop=False)
