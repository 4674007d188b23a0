"""What the engine process (rank 0) tells the processes of the other ranks, and how: MessagePack over a socket pair.

    rank 0 -> rank      StartRank, JoinGroup; then ResetSlot, CopySlot, TakeSlot, RestoreSlot, Step, in any order
    rank -> rank 0      RankLoaded | RankFailed, once

Only plans travel here. What belongs to them in bulk (token ids, states) follows over the ranks' group, to and from
the devices. A rank lives no longer than rank 0: its standard input is a pipe whose other end only rank 0 holds.
"""

from multiprocessing.connection import Connection

import msgspec

from server.engine.types.requests import EngineConfig


class StartRank(msgspec.Struct, frozen=True, tag="start", array_like=True):
    """Load your part of the model.

    Attributes:
        config: of the engine.
        rank: from 1 on.
        folder: private to the ranks, for their meeting; whoever sees the others die removes it.
    """

    config: EngineConfig
    rank: int
    folder: str


class JoinGroup(msgspec.Struct, frozen=True, tag="join", array_like=True):
    """Take memory for so many slots, the scratch slot not counted, and meet the others: all have loaded."""

    num_slots: int


class ResetSlot(msgspec.Struct, frozen=True, tag="reset", array_like=True):
    """Clear a slot."""

    slot: int


class CopySlot(msgspec.Struct, frozen=True, tag="copy", array_like=True):
    """Make the target slot what the source slot is."""

    source: int
    target: int


class TakeSlot(msgspec.Struct, frozen=True, tag="take", array_like=True):
    """Send your part of a slot to rank 0."""

    slot: int


class RestoreSlot(msgspec.Struct, frozen=True, tag="restore", array_like=True):
    """Take your part of a slot from rank 0."""

    slot: int


class Step(msgspec.Struct, frozen=True, tag="step", array_like=True):
    """Run a step, whose words rank 0 shares: token ids, positions, slots, rows of logits (see `PackedBatch`).

    Attributes:
        lengths: tokens of each sequence.
        num_decode: sequences of one token that come first.
        num_logit_rows: tokens whose logits are wanted.
    """

    lengths: tuple[int, ...]
    num_decode: int
    num_logit_rows: int


class RankLoaded(msgspec.Struct, frozen=True, tag="loaded", array_like=True):
    """The part of the model is loaded."""


class RankFailed(msgspec.Struct, frozen=True, tag="failed", array_like=True):
    """It cannot be loaded; the process ends. See `server.engine.process.messages.LoadFailed`."""

    reason: str
    is_permanent: bool


Plan = StartRank | JoinGroup | ResetSlot | CopySlot | TakeSlot | RestoreSlot | Step
Answer = RankLoaded | RankFailed

_encoder = msgspec.msgpack.Encoder()
_plans: "msgspec.msgpack.Decoder[Plan]" = msgspec.msgpack.Decoder(Plan)
_answers: "msgspec.msgpack.Decoder[Answer]" = msgspec.msgpack.Decoder(Answer)


def encode(message: Plan | Answer) -> bytes:
    """One message."""
    return _encoder.encode(message)


def next_plan(connection: "Connection[bytes, bytes]") -> Plan:
    """Waits for rank 0's next plan.

    Raises:
        EOFError: rank 0 is gone.
    """
    return _plans.decode(connection.recv_bytes())


def next_answer(connection: "Connection[bytes, bytes]") -> Answer:
    """Waits for a rank's answer.

    Raises:
        EOFError: the rank is gone.
    """
    return _answers.decode(connection.recv_bytes())
