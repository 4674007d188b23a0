"""The kept steps: always what the batch says."""

from collections.abc import Sequence as Items
from dataclasses import replace
from typing import cast

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dijiang_model.serving.decoding import Decoding
from dijiang_model.state import StateBuffer
from server.engine.batch import Batch
from server.engine.fast_steps.decode_rows import DecodeRows
from server.engine.sequence import Chunk, Sequence
from server.engine.types.logprobs import LogprobOptions
from tests.server.engine.fakes import request

NUM_SLOTS = 5


class Prepared:
    """In the place of a `Decoding`: where its next step begins, which every step moves on."""

    def __init__(self, slots: Items[int], positions: Items[int]) -> None:
        self.slots, self.positions = [*slots], [*positions]

    def step(self) -> dict[int, int]:
        fed = dict(zip(self.slots, self.positions, strict=True))
        self.positions = [position + 1 for position in self.positions]
        return fed


def prepared(
    *, slots: Items[int], positions: Items[int], last_token_ids: Tensor, state: StateBuffer
) -> Decoding | None:
    return cast(Decoding, Prepared(slots, positions))


def decode_rows() -> DecodeRows:
    return DecodeRows(prepared, torch.zeros(NUM_SLOTS + 1).long(), cast(StateBuffer, None), vocab_size=260)


def decoding(sequences: dict[int, Sequence], positions: dict[int, int]) -> Batch:
    """A step in which the sequences in these slots decode at these positions."""
    chunks = tuple(
        Chunk(sequences[slot], slot, start, length=1, output_index=0, is_decode=True)
        for slot, start in positions.items()
    )
    return Batch(chunks, num_decode=len(chunks), sampled=chunks)


def prompt() -> Batch:
    chunk = Chunk(Sequence(request("one"), ()), slot=1, start=0, length=1, output_index=0, is_decode=False)
    return Batch((chunk,), num_decode=0, sampled=(chunk,))


# Slots of the next step: those of the last one, some of them or others, the new ones at their own positions.
changes = st.lists(st.sampled_from(["go on", "prompt"]) | st.sets(st.integers(1, NUM_SLOTS), min_size=1), max_size=12)


@given(changes=changes)
def test_a_step_feeds_the_slots_and_positions_of_its_batch_whatever_came_before(
    changes: list[str | set[int]],
) -> None:
    rows = decode_rows()
    sequences = {slot: Sequence(request(f"{slot}"), ()) for slot in range(1, NUM_SLOTS + 1)}
    at = {slot: 10 * slot for slot in sequences}
    slots = [1]
    for change in changes:
        if change == "prompt":
            assert rows.of(prompt()) is None
            continue
        slots = sorted(change) if isinstance(change, set) else slots
        positions = {slot: at[slot] for slot in slots}
        found = rows.of(decoding(sequences, positions))
        assert found is not None
        assert cast(Prepared, found.decoding).step() == positions
        assert found.slots.tolist() == slots
        at |= {slot: position + 1 for slot, position in positions.items()}


def test_a_slot_that_another_sequence_has_taken_is_prepared_anew() -> None:
    rows = decode_rows()
    for name, position in (("first", 3), ("second", 9)):
        found = rows.of(decoding({1: Sequence(request(name), ())}, {1: position}))
        assert found is not None
        assert cast(Prepared, found.decoding).step() == {1: position}


def test_the_kernels_choose_unless_anybody_wants_more_than_they_can() -> None:
    wishes = (
        (request("plain"), True, True),
        (request("drawn", temperature=0.5), False, True),
        (request("filtered", temperature=0.5, top_p=0.9, top_k=7, min_p=0.1), False, True),
        (request("typical", temperature=0.5, typical_p=0.9), False, False),
        (request("biased", logit_bias=((3, 1.0),)), False, False),
        (request("long", min_tokens=4), False, False),
        (replace(request("scored"), logprobs=LogprobOptions(num_output=1)), False, False),
    )
    for wish, is_greedy, by_rules in wishes:
        sequences = {1: Sequence(request("other"), ()), 2: Sequence(wish, ())}
        found = decode_rows().of(decoding(sequences, {1: 3, 2: 5}))
        assert found is not None
        assert found.is_greedy is is_greedy
        assert (found.rules is not None) is by_rules


def test_steps_that_nothing_can_prepare_are_asked_for_again() -> None:
    rows = DecodeRows(lambda **inputs: None, torch.zeros(NUM_SLOTS + 1).long(), cast(StateBuffer, None), vocab_size=260)
    sequences = {1: Sequence(request("one"), ())}
    for position in (3, 4):
        assert rows.of(decoding(sequences, {1: position})) is None
