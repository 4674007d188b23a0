"""The kept input of decode steps: always what the batch says."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine.decode_rows import DecodeRows
from server.engine.scheduler import Batch
from server.engine.sequence import Chunk, Sequence
from tests.engine.fakes import request

NUM_SLOTS = 5


def decoding(positions: dict[int, int]) -> Batch:
    """A step in which the sequences in these slots decode at these positions."""
    chunks = tuple(
        Chunk(Sequence(request("one"), ()), slot, start, length=1, output_index=0, is_decode=True)
        for slot, start in positions.items()
    )
    return Batch(chunks, num_decode=len(chunks), sampled=chunks)


def prompt() -> Batch:
    chunk = Chunk(Sequence(request("one"), ()), slot=1, start=0, length=1, output_index=0, is_decode=False)
    return Batch((chunk,), num_decode=0, sampled=(chunk,))


changes = st.lists(
    st.sampled_from(["go on", "prompt"]) | st.dictionaries(st.integers(1, NUM_SLOTS), st.integers(1, 9), min_size=1),
    max_size=8,
)


@given(changes=changes)
def test_slots_and_positions_are_those_of_the_batch_whatever_came_before(
    changes: list[str | dict[int, int]],
) -> None:
    rows, positions = DecodeRows(), {1: 3}
    last_token_ids = torch.arange(100, 100 + NUM_SLOTS + 1)
    for change in changes:
        if change == "prompt":
            assert rows.of(prompt()) is None
            continue
        positions = dict(change) if isinstance(change, dict) else {slot: at + 1 for slot, at in positions.items()}
        found = rows.of(decoding(positions))
        assert found is not None
        packed = found.packed(last_token_ids)
        assert packed.slots.tolist() == [*positions]
        assert packed.positions.tolist() == [*positions.values()]
        assert packed.token_ids.tolist() == [100 + slot for slot in positions]
        assert packed.logit_rows.tolist() == [*range(len(positions))]
        assert packed.lengths == (1,) * len(positions)
        assert packed.num_decode == len(positions)
