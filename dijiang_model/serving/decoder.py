"""Runs whole steps in the compiled kernels, on the weights of a model as they were when it was frozen."""

import ctypes
from collections.abc import Sequence
from ctypes import CDLL
from dataclasses import dataclass

import torch
from torch import Tensor

from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.native.library import load_library, variant_of
from dijiang_model.serving.decoding import Decoding
from dijiang_model.serving.weights import network_weights, token_table
from dijiang_model.state import StateBuffer

MAX_UNCOMMITTED_ROWS = 256
"""Tokens that a uncommitted sequence may have in a step."""


@dataclass(frozen=True, slots=True)
class _Uncommitted:
    """What a step has kept of the M rows of its uncommitted sequences.

    Attributes:
        kept: [L, M, projected width] fp32.
        positions: [M] int64.
        slots, lengths: [N] int64.
        storage: where the slots are.
    """

    kept: Tensor
    positions: Tensor
    slots: Tensor
    lengths: Tensor
    storage: Tensor


class NativeDecoder:
    """Decode rows and prefill segments of one model, token by token, every layer in one call.

    A token's logits and the state it leaves are the same bit for bit whatever the other rows are, however
    many threads there are and however its prompt is cut into segments. They equal those of the torch path up
    to the order of fp32 sums.
    """

    def __init__(self, model: DiJiangForCausalLM, *, library: CDLL | None = None) -> None:
        """Takes the best kernels of `library.load_library()` unless others are given."""
        library = load_library() if library is None else library
        assert library is not None
        self._library = library
        self.kernels = variant_of(library)
        self._step = library.dijiang_step
        self._advance = library.dijiang_advance
        self._uncommitted: _Uncommitted | None = None
        self._ones = torch.ones(1, dtype=torch.int64)
        self._weights = network_weights(model)
        self._table = token_table(self._weights, model)
        self._vocab_size = model.config.vocab_size
        self._num_layers = model.config.num_layers
        layer = self._weights.network.layers[0]
        num_scores = self._weights.network.heads.num_scores
        self._projected_width = layer.query.rows + layer.key.rows + layer.value.rows + num_scores

    def step(
        self,
        hidden: Tensor,
        *,
        positions: Tensor,
        slots: Tensor,
        lengths: Sequence[int],
        wanted: Tensor,
        state: StateBuffer,
        first_uncommitted: int = 0,
        num_uncommitted: int = 0,
    ) -> Tensor:
        """Feeds a segment to each of N sequences, moving their slots on in place.

        Args:
            hidden: [T, D] fp32, what the first block reads; overwritten.
            positions: [T] int64.
            slots: [N] int64.
            lengths: N ints >= 1, rows of each sequence; they sum to T.
            wanted: [R] int64, rows below T.
            state: a buffer on the CPU.
            first_uncommitted, num_uncommitted: these sequences leave their slots as they are, until `advance`; each has
                at most `MAX_UNCOMMITTED_ROWS` rows.

        Returns:
            [R, vocab] fp32: next-token logits.
        """
        num_rows, storage, rows_of = len(hidden), state.storage, self._lengths(lengths)
        positions, slots, wanted = positions.contiguous(), slots.contiguous(), wanted.contiguous()
        _check_rows(hidden, positions, lengths)
        assert storage.is_contiguous()
        # The kernels do not check: an index out of range would write anywhere.
        _check_indices(slots, limit=state.num_slots, count=len(lengths))
        _check_indices(wanted, limit=num_rows, count=len(wanted))
        assert 0 <= first_uncommitted <= first_uncommitted + num_uncommitted <= len(lengths)
        uncommitted = slice(first_uncommitted, first_uncommitted + num_uncommitted)
        assert max(lengths[uncommitted], default=0) <= MAX_UNCOMMITTED_ROWS
        self._uncommitted = self._keep_uncommitted(positions, slots, lengths, storage, uncommitted)
        logits = torch.empty((len(wanted), self._vocab_size), dtype=torch.float32)
        failed = self._step(
            ctypes.addressof(self._weights.network),
            hidden.data_ptr(),
            positions.data_ptr(),
            num_rows,
            slots.data_ptr(),
            rows_of.data_ptr(),
            len(lengths),
            storage.data_ptr(),
            storage.shape[1],
            wanted.data_ptr(),
            len(wanted),
            logits.data_ptr(),
            first_uncommitted,
            num_uncommitted,
            0 if self._uncommitted is None else self._uncommitted.kept.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for a step of {num_rows} rows")
        return logits

    def decoding(
        self, *, slots: Sequence[int], positions: Sequence[int], last_token_ids: Tensor, state: StateBuffer
    ) -> Decoding | None:
        """Steps of sequences that feed a token each; see `Decoding`. None where tokens are more than looked up."""
        if self._table is None:
            return None
        return Decoding(
            self._library,
            self._weights.network,
            self._table,
            kept=self._weights,
            slots=slots,
            positions=positions,
            last_token_ids=last_token_ids,
            state=state,
        )

    def advance(self, counts: Sequence[int], state: StateBuffer) -> None:
        """Commits the last step's uncommitted sequences, once: to the same bits as if they had not been deferred.

        Args:
            counts: for each of them, by how many of its tokens, from the first on.
            state: the buffer of that step.
        """
        uncommitted, self._uncommitted = self._uncommitted, None
        assert uncommitted is not None
        assert uncommitted.storage is state.storage
        lengths = uncommitted.lengths.tolist()
        assert len(counts) == len(lengths)
        assert all(0 <= count <= length for count, length in zip(counts, lengths, strict=True))
        failed = self._advance(
            ctypes.addressof(self._weights.network),
            uncommitted.kept.data_ptr(),
            uncommitted.positions.data_ptr(),
            len(uncommitted.positions),
            uncommitted.slots.data_ptr(),
            uncommitted.lengths.data_ptr(),
            (ctypes.c_int64 * len(counts))(*counts),
            len(counts),
            state.storage.data_ptr(),
            state.storage.shape[1],
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory to move {len(counts)} states on")

    def _lengths(self, lengths: Sequence[int]) -> Tensor:
        """[N] int64; those of a step in which every sequence has one row are kept."""
        count = len(lengths)
        if sum(lengths) != count:
            return torch.tensor(lengths, dtype=torch.int64)
        if len(self._ones) < count:
            self._ones = torch.ones(count, dtype=torch.int64)
        return self._ones

    def _keep_uncommitted(
        self, positions: Tensor, slots: Tensor, lengths: Sequence[int], storage: Tensor, uncommitted: slice
    ) -> _Uncommitted | None:
        """Room for what a step is going to keep; None if it holds nothing."""
        own = torch.tensor(lengths[uncommitted], dtype=torch.int64)
        if len(own) == 0:
            return None
        first, num_rows = sum(lengths[: uncommitted.start]), int(own.sum())
        kept = torch.empty((self._num_layers, num_rows, self._projected_width), dtype=torch.float32)
        return _Uncommitted(kept, positions[first : first + num_rows].clone(), slots[uncommitted].clone(), own, storage)


def _check_rows(hidden: Tensor, positions: Tensor, lengths: Sequence[int]) -> None:
    """Asserts that a step's rows are laid out as the kernels read them."""
    assert hidden.is_contiguous()
    assert hidden.dtype == torch.float32
    assert positions.dtype == torch.int64
    assert len(positions) == len(hidden) == sum(lengths)
    assert min(lengths) >= 1


def _check_indices(indices: Tensor, *, limit: int, count: int) -> None:
    """Raises IndexError unless all int64 `indices` are in [0, limit)."""
    assert indices.dtype == torch.int64
    assert len(indices) == count
    if count > 0:
        values = indices.tolist()  # few: cheaper than operations on tensors
        low, high = min(values), max(values)
        if low < 0 or high >= limit:
            raise IndexError(f"indices {low} to {high} are not all in 0 to {limit - 1}")
