"""Server-sent events are parsed as the specification has it, wherever the bytes are split."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.streaming import EventDecoder, ServerSentEvent


def decode(*pieces: bytes) -> list[tuple[str, str]]:
    decoder = EventDecoder()
    return [(event.event, event.data) for piece in pieces for event in decoder.push(piece)]


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"data: one\n\n", [("message", "one")]),
        (b"data:one\n\ndata: two\n\n", [("message", "one"), ("message", "two")]),
        (b"data: a\r\ndata: b\r\n\r\n", [("message", "a\nb")]),
        (b"data: a\rdata: b\r\r", [("message", "a\nb")]),
        (b"data:  two spaces\n\n", [("message", " two spaces")]),
        (b"data\n\n", [("message", "")]),
        (b": keep-alive\n\ndata: x\n: comment\ndata: y\n\n", [("message", "x\ny")]),
        (b"event: done\nid: 7\nretry: 10\nunknown: z\ndata: x\n\n", [("done", "x")]),
        (b"event: nothing\n\ndata: x\n\n", [("message", "x")]),
        (b"\xef\xbb\xbfdata: marked\n\n", [("message", "marked")]),
        (b"data: a:b\n\n", [("message", "a:b")]),
        ("data: zwölf 你好 🙂\n\n".encode(), [("message", "zwölf 你好 🙂")]),
        (b"data: bad \xff byte\n\n", [("message", "bad \ufffd byte")]),
        (b"data: cut off", []),
        (b"data: cut off\n", []),
    ],
)
def test_stream_is_parsed_as_specified(stream: bytes, expected: list[tuple[str, str]]) -> None:
    assert decode(stream) == expected
    assert decode(*(bytes([byte]) for byte in stream)) == expected


LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=8)


@given(
    events=st.lists(st.lists(LINES, min_size=1, max_size=3), max_size=4),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=st.lists(st.integers(0, 400), max_size=10),
)
def test_any_split_gives_the_same_events(events: list[list[str]], line_end: str, cuts: list[int]) -> None:
    text = "".join("".join(f"data: {line}{line_end}" for line in lines) + line_end for lines in events)
    stream = text.encode()
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[start:end] for start, end in pairwise(places)]
    assert decode(*pieces) == [("message", "\n".join(lines)) for lines in events]


def test_event_is_there_as_soon_as_its_blank_line_is() -> None:
    decoder = EventDecoder()
    assert decoder.push(b"data: a\r\n\r") == [ServerSentEvent("message", "a")]
    assert decoder.push(b"\ndata: b\r\n\r\n") == [ServerSentEvent("message", "b")]
