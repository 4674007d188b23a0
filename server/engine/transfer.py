"""Many small lists of numbers, one copy from the host to the device.

A step describes itself with a dozen lists. Collected here they travel as one buffer of 8-byte words,
through pinned memory to a CUDA device so that the copy does not hold up the host.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Field:
    """One list's place in a `Transfer`: words `start` to `stop` of its integers or of its reals."""

    is_real: bool
    start: int
    stop: int


class TransferredFields:
    """What a transfer brought to the device; `arrived[field]` is a view, no copy.

    Attributes:
        words: [n] int64, everything: integers first, then the bits of reals.
    """

    def __init__(self, words: Tensor, num_integers: int) -> None:
        self.words = words
        self._num_integers = num_integers

    def __getitem__(self, field: Field) -> Tensor:
        """The list as a tensor [n]: int64, or float64 for reals."""
        if not field.is_real:
            return self.words[field.start : field.stop]
        first = self._num_integers
        return self.words[first + field.start : first + field.stop].view(torch.float64)


class Transfer:
    """Collects lists; `send` brings them all over."""

    def __init__(self) -> None:
        self._integers = array("q")
        self._reals = array("d")

    def integers(self, values: Iterable[int]) -> Field:
        """Adds 64-bit integers."""
        start = len(self._integers)
        self._integers.extend(values)
        return Field(False, start, len(self._integers))

    def reals(self, values: Iterable[float]) -> Field:
        """Adds 64-bit floating-point numbers."""
        start = len(self._reals)
        self._reals.extend(values)
        return Field(True, start, len(self._reals))

    def send(self, device: torch.device) -> TransferredFields:
        """One copy to the device; not waited for where the device is CUDA."""
        if not (self._integers or self._reals):
            return TransferredFields(torch.empty(0, dtype=torch.int64, device=device), 0)
        content = bytearray(self._integers.tobytes() + self._reals.tobytes())
        words = torch.frombuffer(content, dtype=torch.int64)
        if device.type == "cuda":
            words = words.pin_memory().to(device, non_blocking=True)
        return TransferredFields(words, len(self._integers))
