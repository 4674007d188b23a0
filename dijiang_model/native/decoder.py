"""Runs the decode rows of a step in the compiled kernels, chosen once when a model is prepared."""

import ctypes
from ctypes import CDLL
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dijiang_model.native.library import load_library
from dijiang_model.native.weights import network_weights, why_unsupported
from dijiang_model.state import StateBuffer

if TYPE_CHECKING:
    from dijiang_model.model import DiJiangForCausalLM, PackedBatch


def decoder_for(model: "DiJiangForCausalLM") -> "NativeDecoder | None":
    """The kernels on a model's weights; None where they cannot run it (see `weights.why_unsupported`)."""
    return NativeDecoder(model) if why_unsupported(model) is None else None


class NativeDecoder:
    """The decode step of one model.

    A row's logits and state are the same bit for bit whatever the other rows are and however many threads
    there are. They equal those of the torch path up to the order of fp32 sums.
    """

    def __init__(self, model: "DiJiangForCausalLM", *, library: CDLL | None = None) -> None:
        """Takes the best kernels of `library.load_library()` unless others are given."""
        library = load_library() if library is None else library
        assert library is not None
        self._step = library.dijiang_step
        self._weights = network_weights(model)
        self._versions = self._current_versions()
        self._vocab_size = model.config.vocab_size

    @property
    def is_current(self) -> bool:
        """Whether the parameters are still those that vectors were derived from (training moves them)."""
        return self._versions == self._current_versions()

    def step(self, hidden: Tensor, *, positions: Tensor, slots: Tensor, wanted: Tensor, state: StateBuffer) -> Tensor:
        """Feeds one token to each of N sequences, moving their slots on in place.

        Args:
            hidden: [N, D] fp32, what the first block reads; overwritten.
            positions, slots: [N] int64.
            wanted: [R] int64, rows below N.
            state: a buffer on the CPU.

        Returns:
            [R, vocab] fp32: next-token logits.
        """
        num_rows, storage = len(hidden), state.storage
        positions, slots, wanted = positions.contiguous(), slots.contiguous(), wanted.contiguous()
        assert storage.is_contiguous()
        assert hidden.is_contiguous()
        assert hidden.dtype == torch.float32
        # The kernels do not check: an index out of range would write anywhere.
        _check_indices(slots, limit=state.num_slots, count=num_rows)
        _check_indices(wanted, limit=num_rows)
        assert len(positions) == num_rows
        assert len(wanted) <= num_rows, "the kernels keep a normed row for each row of the step"
        logits = torch.empty((len(wanted), self._vocab_size), dtype=torch.float32)
        failed = self._step(
            ctypes.addressof(self._weights.network),
            hidden.data_ptr(),
            positions.data_ptr(),
            slots.data_ptr(),
            num_rows,
            storage.data_ptr(),
            storage.shape[1],
            wanted.data_ptr(),
            len(wanted),
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for a decode step of {num_rows} rows")
        return logits

    def _current_versions(self) -> list[int]:
        return [tensor._version for tensor in self._weights.watched]


def _check_indices(indices: Tensor, *, limit: int, count: int | None = None) -> None:
    """Raises IndexError unless all int64 `indices` are in [0, limit)."""
    assert indices.dtype == torch.int64
    assert count is None or len(indices) == count
    if len(indices) > 0:
        low, high = torch.aminmax(indices)
        if low < 0 or high >= limit:
            raise IndexError(f"indices {int(low)} to {int(high)} are not all in 0 to {limit - 1}")


def mixed_step(model: "DiJiangForCausalLM", decoder: NativeDecoder, batch: "PackedBatch", state: StateBuffer) -> Tensor:
    """A step's logits [R, vocab]: decode rows in the kernels, prefill segments, if any, in torch."""
    split, rows = batch.num_decode, batch.logit_rows
    is_decode = rows < split
    decoded = decoder.step(
        model.embed(batch.token_ids[:split], batch.positions[:split]),
        positions=batch.positions[:split],
        slots=batch.slots[:split],
        wanted=rows[is_decode],
        state=state,
    )
    if split == len(batch.lengths):
        return decoded
    prefilled = cast(Tensor, model(batch.without_decode(), state))
    logits = decoded.new_empty((len(rows), decoded.shape[1]))
    logits[is_decode] = decoded
    logits[~is_decode] = prefilled
    return logits
