"""What segments leave in the exact rows, found from their lengths alone, against one token after the other."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dijiang_model.ops.layout import PrefillLayout


@given(
    segments=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 90)), min_size=1, max_size=3),
    window=st.integers(1, 70),
    sinks=st.integers(0, 5),
)
def test_rows_hold_what_tokens_one_by_one_would_leave(segments: list[tuple[int, int]], window: int, sinks: int) -> None:
    positions = torch.cat([torch.arange(first, first + length) for first, length in segments])
    lengths, slots = tuple(length for _, length in segments), torch.arange(len(segments))
    writes = PrefillLayout(positions, slots, lengths).writes(window=window, sinks=sinks)
    found = torch.full((len(segments), sinks + window), -1)
    expected = found.clone()
    found[writes.sink_sequences, writes.sink_rows] = writes.sink_tokens
    found[writes.sequences, writes.rows] = writes.tokens
    token = 0
    for n, (first, length) in enumerate(segments):
        for position in range(first, first + length):
            expected[n, sinks + position % window] = token
            if position < sinks:
                expected[n, position] = token
            token += 1
    assert torch.equal(found, expected)
