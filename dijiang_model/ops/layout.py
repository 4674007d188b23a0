"""What one step's packed batch looks like to the attention, computed once and shared by all layers.

Letters: T tokens of the step, N sequences, C chunk length, M chunks, W window, Z sinks.
The first `num_decode` sequences have one token each and take the recurrent path; the others are prefill
segments, cut into chunks of at most `CHUNK_TOKENS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from dijiang_model.rotary import Frequencies

CHUNK_TOKENS = 64


@cache
def frequencies_on(frequencies: Frequencies, device: torch.device) -> Tensor:
    """[dims / 2] fp64, made once: a copy to the device in every step otherwise.

    No step may ask for them first while it is recorded, for they would lie in the recording's memory; `CudaCapture`
    does its work once before it records.
    """
    with torch.inference_mode(False):
        return torch.tensor(frequencies, dtype=torch.float64, device=device)


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; nobody waits for a copy to CUDA."""
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)


def sent_lists(lists: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Each list as a tensor [its length] int64, in one copy."""
    numbers = torch.tensor([number for one in lists for number in one], dtype=torch.int64)
    on_device: tuple[Tensor, ...] = sent(numbers, device).split([len(one) for one in lists])
    return on_device


@dataclass(frozen=True, slots=True)
class Rotary:
    """Cosines and sines of the step's positions, [T, rotary_dims / 2] each, and radians for each position."""

    cos: Tensor
    sin: Tensor
    frequencies: Frequencies

    @classmethod
    def at(cls, positions: Tensor, *, frequencies: Frequencies, dtype: torch.dtype) -> "Rotary":
        """Angles in fp64: in fp32 a position of 10^6 is off by 0.06 rad."""
        angles = positions.double()[:, None] * frequencies_on(frequencies, positions.device)
        return cls(angles.cos().to(dtype), angles.sin().to(dtype), frequencies)

    def apply(self, x: Tensor) -> Tensor:
        """Rotates the first `dims` channels of x [T, heads, d] (half-split pairing, as HF does)."""
        half = self.cos.shape[-1]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = self.cos[:, None, :], self.sin[:, None, :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    def rows(self, start: int, stop: int) -> "Rotary":
        return Rotary(self.cos[start:stop], self.sin[start:stop], self.frequencies)

    def undo(self, x: Tensor, *, earlier: int = 0) -> Tensor:
        """Rotates x [T, heads, d] back from the positions that lie `earlier` tokens before these."""
        position = torch.full((1,), earlier, device=self.cos.device)  # made there: a captured step copies nothing
        step = Rotary.at(position, frequencies=self.frequencies, dtype=self.cos.dtype)
        cos = self.cos * step.cos + self.sin * step.sin
        sin = self.sin * step.cos - self.cos * step.sin
        return Rotary(cos, -sin, self.frequencies).apply(x)


@dataclass(frozen=True, slots=True)
class DecodeWindow:
    """The exact tokens of decode rows for one (window, sinks) pair; exact rows are [sinks | ring].

    Attributes:
        ring_row: [N] row of the exact tensors that the new token takes, and the leaving one held.
        sink_row: [N] second row written: the sink's while the position is a sink's, else `ring_row`.
        leaves: [N, 1] bool, whether the token in `ring_row` goes over into the linear state.
        visible: [N, 1, 1, Z + W] bool, exact rows that hold a token to be seen, each token once.
    """

    ring_row: Tensor
    sink_row: Tensor
    leaves: Tensor
    visible: Tensor

    @classmethod
    def at(cls, positions: Tensor, *, window: int, sinks: int) -> "DecodeWindow":
        ring = positions % window
        columns = torch.arange(window, device=positions.device)
        held = positions[:, None] - (ring[:, None] - columns) % window
        sink_seen = torch.arange(sinks, device=positions.device) <= positions[:, None]
        visible = torch.cat([sink_seen, held >= sinks], dim=1)
        return cls(
            ring_row=sinks + ring,
            sink_row=torch.where(positions < sinks, positions, sinks + ring),
            leaves=(positions - window >= sinks)[:, None],
            visible=visible[:, None, None, :],
        )


@dataclass(frozen=True, slots=True)
class PrefillWindow:
    """The exact tokens of prefill chunks for one (window, sinks) pair.

    A sequence's *extended* stream is its ring in order of time (W tokens before the segment) followed by the
    segment. The query at offset i sees extended tokens i+1 ... i+W; extended token i leaves the window as it comes.

    Attributes:
        ring_rows: [N, W] exact rows of the ring in order of time.
        leaving: [T] index of each query's leaving token in [all rings | all segments].
        leaves: [T, 1] bool, whether that token exists and is no sink.
        band: [M, C + W - 1] indices into [all rings | all segments]: the keys near a chunk.
        band_visible: [M, C, C + W - 1] bool.
        sinks_visible: [M, C, Z] bool.
    """

    ring_rows: Tensor
    leaving: Tensor
    leaves: Tensor
    band: Tensor
    band_visible: Tensor
    sinks_visible: Tensor


@dataclass(frozen=True, slots=True)
class WindowWrites:
    """What the segments leave in the exact rows for one (window, sinks) pair.

    How many they are follows from the lengths alone, so that the host waits for no device.

    Attributes:
        rows, tokens, sequences: exact row, token and sequence of each write: of the last W tokens of each segment.
        sink_rows, sink_tokens, sink_sequences: the same for its first Z tokens, written before the others. One that is
            no sink has its row in the ring, which is that token's, or another's by then.
    """

    rows: Tensor
    tokens: Tensor
    sequences: Tensor
    sink_rows: Tensor
    sink_tokens: Tensor
    sink_sequences: Tensor


class PrefillLayout:
    """The prefill segments of a step, cut into chunks; what only some operators ask for is made when asked for.

    Attributes:
        slots: [N] int64.
        positions: [T] int64 (prefill tokens only).
        starts: N + 1 host ints, first token of each segment and their end; `cu_seqlens` [N + 1] on the device.
        num_chunks: M.
        first_chunks: [N + 1] first chunk of each sequence, and their end.
        chunk_sequence: [M] sequence of each chunk.
        chunk_offset: [M] offset of the chunk's first token in its segment.
        tokens: [M, C] token of each place (clamped where there is none).
        valid: [M, C] bool.
        places: [T] flat place m * C + i of each token, the inverse of `tokens`.
        rounds: for r = 0, 1, ...: (chunks, sequences) that are the r-th chunk of their sequence.
    """

    def __init__(self, positions: Tensor, slots: Tensor, lengths: tuple[int, ...]) -> None:
        device = positions.device
        self.positions, self.slots, self.lengths = positions, slots, lengths
        self.starts, first_chunks = [0], [0]
        for length in lengths:
            self.starts.append(self.starts[-1] + length)
            first_chunks.append(first_chunks[-1] - -length // CHUNK_TOKENS)
        chunks = [(n, offset) for n, length in enumerate(lengths) for offset in range(0, length, CHUNK_TOKENS)]
        self.chunk_tokens, self.num_chunks = CHUNK_TOKENS, len(chunks)
        sequences, offsets = zip(*chunks, strict=True)
        on_device = sent_lists((sequences, offsets, self.starts, first_chunks), device)
        self.chunk_sequence, self.chunk_offset, self.cu_seqlens, self.first_chunks = on_device
        self.sequence_start = self.cu_seqlens[:-1]
        self.sequence_length = self.cu_seqlens[1:] - self.sequence_start
        self._windows: dict[tuple[int, int], PrefillWindow] = {}
        self._writes: dict[tuple[int, int], WindowWrites] = {}

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @cached_property
    def _within(self) -> Tensor:
        """[M, C] offsets in the segment."""
        within: Tensor = self.chunk_offset[:, None] + torch.arange(CHUNK_TOKENS, device=self.positions.device)
        return within

    @cached_property
    def valid(self) -> Tensor:
        valid: Tensor = self._within < self.sequence_length[self.chunk_sequence][:, None]
        return valid

    @cached_property
    def tokens(self) -> Tensor:
        last = self.sequence_length[self.chunk_sequence][:, None] - 1
        tokens: Tensor = self.sequence_start[self.chunk_sequence][:, None] + torch.minimum(self._within, last)
        return tokens

    @cached_property
    def places(self) -> Tensor:
        # Not those that are valid: the host would wait for their number.
        sequence = self.sequence_of_token
        offset = torch.arange(len(sequence), device=sequence.device) - self.sequence_start[sequence]
        chunk = self.first_chunks[sequence] + offset // CHUNK_TOKENS
        places: Tensor = chunk * CHUNK_TOKENS + offset % CHUNK_TOKENS
        return places

    @cached_property
    def rounds(self) -> list[tuple[Tensor, Tensor]]:
        num_rounds = -(-max(self.lengths) // CHUNK_TOKENS)
        chunks: list[list[int]] = [[] for _ in range(num_rounds)]
        sequences: list[list[int]] = [[] for _ in range(num_rounds)]
        m = 0
        for n, length in enumerate(self.lengths):
            for index in range(-(-length // CHUNK_TOKENS)):
                chunks[index].append(m)
                sequences[index].append(n)
                m += 1
        on_device = sent_lists((*chunks, *sequences), self.positions.device)
        return list(zip(on_device[:num_rounds], on_device[num_rounds:], strict=True))

    @cached_property
    def sequence_of_token(self) -> Tensor:
        """[T] int64."""
        return torch.repeat_interleave(self.sequence_length, output_size=self.starts[-1])

    def window(self, *, window: int, sinks: int) -> PrefillWindow:
        """The indices for one (window, sinks) pair; computed once a step."""
        key = (window, sinks)
        if key not in self._windows:
            self._windows[key] = self._build_window(window, sinks)
        return self._windows[key]

    def _build_window(self, window: int, sinks: int) -> PrefillWindow:
        device = self.positions.device
        sequence = self.sequence_of_token
        first_position = self.positions[self.sequence_start]  # [N]
        offset = torch.arange(self.positions.shape[0], device=device) - self.sequence_start[sequence]
        num_ring_tokens = self.num_sequences * window

        def extended(n: Tensor, j: Tensor) -> Tensor:
            """Index of sequence n's extended token j in [all rings | all segments], clamped into the segment."""
            inside = torch.minimum(j - window, self.sequence_length[n] - 1)
            return torch.where(j < window, n * window + j, num_ring_tokens + self.sequence_start[n] + inside)

        ring_positions = first_position[:, None] - window + torch.arange(window, device=device)
        m_sequence = self.chunk_sequence[:, None]
        band_offset = self.chunk_offset[:, None] + 1 + torch.arange(CHUNK_TOKENS + window - 1, device=device)
        band_position = first_position[m_sequence] - window + band_offset
        distance = (
            torch.arange(1, CHUNK_TOKENS + window, device=device)[None, :]
            - torch.arange(CHUNK_TOKENS, device=device)[:, None]
        )
        in_window = (distance >= 1) & (distance <= window)  # [C, C + W - 1]
        query_position = (
            first_position[m_sequence] + self.chunk_offset[:, None] + torch.arange(CHUNK_TOKENS, device=device)
        )
        return PrefillWindow(
            ring_rows=sinks + ring_positions % window,
            leaving=extended(sequence, offset),
            leaves=(self.positions - window >= sinks)[:, None],
            band=extended(m_sequence.expand_as(band_offset), band_offset),
            band_visible=in_window & (band_position >= sinks)[:, None, :],
            sinks_visible=torch.arange(sinks, device=device) <= query_position[:, :, None],
        )

    def writes(self, *, window: int, sinks: int) -> WindowWrites:
        """The writes for one (window > 0, sinks) pair; found once a step."""
        key = (window, sinks)
        if key not in self._writes:
            own = [range(*ends) for ends in zip(self.starts, self.starts[1:], strict=False)]
            kept = [(token, n) for n, tokens in enumerate(own) for token in tokens[-window:]]
            first = [(token, n) for n, tokens in enumerate(own) for token in tokens[:sinks]]
            columns = [[pair[i] for pair in pairs] for pairs in (kept, first) for i in range(2)]
            tokens, sequences, sink_tokens, sink_sequences = sent_lists(columns, self.positions.device)
            ring, position = sinks + self.positions % window, self.positions[sink_tokens]
            self._writes[key] = WindowWrites(
                rows=ring[tokens],
                tokens=tokens,
                sequences=sequences,
                sink_rows=torch.where(position < sinks, position, ring[sink_tokens]),
                sink_tokens=sink_tokens,
                sink_sequences=sink_sequences,
            )
        return self._writes[key]


@dataclass(slots=True)
class StepLayout:
    """A whole step: decode rows first, then prefill segments.

    Attributes:
        positions: [T] int64, decode rows first.
        decode_slots: [num_decode] int64.
        rotary: at the true positions.
        sink_rotary: at positions capped to the teacher's trained range, for queries that look at sinks.
        prefill: None in a pure decode step.
        local: the same step for layers that rotate in their own way; None: there are none.
    """

    num_decode: int
    positions: Tensor
    decode_slots: Tensor
    rotary: Rotary
    sink_rotary: Rotary
    prefill: PrefillLayout | None
    local: "StepLayout | None" = None
    _decode_windows: dict[tuple[int, int], DecodeWindow] = field(default_factory=dict)

    def rotated(self, rotary: Rotary, sink_rotary: Rotary) -> "StepLayout":
        """The same step with other angles; what both ask for is computed once."""
        return replace(self, rotary=rotary, sink_rotary=sink_rotary, local=None)

    @property
    def decode_positions(self) -> Tensor:
        return self.positions[: self.num_decode]

    def decode_window(self, *, window: int, sinks: int) -> DecodeWindow:
        """The exact rows for one (window, sinks) pair; computed once a step."""
        key = (window, sinks)
        if key not in self._decode_windows:
            self._decode_windows[key] = DecodeWindow.at(self.decode_positions, window=window, sinks=sinks)
        return self._decode_windows[key]
