"""Steps in which every sequence decodes one token, kept from one step to the next where compiled kernels run them.

As long as the same sequences go on, the kernels find everything where they left it: on a CPU, making the same
small tensors anew and choosing tokens with operations on tensors took a tenth of a step.
"""

from collections.abc import Sequence as Items
from ctypes import Array
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dijiang_model.native.structures import DrawRules
from dijiang_model.serving.decoding import Decoding
from dijiang_model.state import StateBuffer
from server.engine.batch import Batch
from server.engine.fast_steps import graph_sampling
from server.engine.sampling.sampler import draw_rules, uniform_of
from server.engine.sequence import Sequence


class Decode(Protocol):
    """Prepares steps of sequences that decode, or cannot: `DiJiangForCausalLM.decoding`."""

    def __call__(
        self, *, slots: Items[int], positions: Items[int], last_token_ids: Tensor, state: StateBuffer
    ) -> Decoding | None: ...


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """The next step of N sequences, run by one call of `decoding`.

    Attributes:
        decoding: at the positions of this step.
        slots: [N] int64.
        rules: how the kernels draw each row's token, but for its random number; a temperature of 0: the most likely
            one. None: some row wants more than that.
        is_greedy: every row wants the most likely token.
    """

    decoding: Decoding
    slots: Tensor
    rules: "Array[DrawRules] | None"
    is_greedy: bool

    def tokens(self, batch: Batch) -> list[int]:
        """Runs the step, and chooses by `rules`; see `Decoding.choose`."""
        assert self.rules is not None
        if self.is_greedy:
            return self.decoding.choose()
        for rule, chunk in zip(self.rules, batch.chunks, strict=True):
            if rule.temperature > 0:
                rule.uniform = uniform_of(chunk)
        return self.decoding.choose(self.rules)


class DecodeRows:
    """Makes and keeps `DecodeStep`s, for a device on which a step is over when it was launched."""

    def __init__(self, decode: Decode, last_token_ids: Tensor, state: StateBuffer, *, vocab_size: int) -> None:
        """
        Args:
            decode: prepares them.
            last_token_ids: [slots of the state] int64: those that a step feeds, as they are then.
            state: the slots.
            vocab_size: width of the logits.
        """
        self._decode = decode
        self._last_token_ids = last_token_ids
        self._state = state
        self._vocab_size = vocab_size
        self._sequences: list[Sequence] = []
        self._step: DecodeStep | None = None

    def of(self, batch: Batch) -> DecodeStep | None:
        """A batch that is launched now; None if some of its chunks are more than one decoded token, or `decode` cannot.

        Must be asked of every batch: a sequence that was in the last step too is one position further.
        """
        chunks = batch.chunks
        if batch.num_decode < len(chunks):
            self._step = None
            return None
        sequences = [chunk.sequence for chunk in chunks]
        if self._step is None or sequences != self._sequences:
            self._sequences, self._step = sequences, self._prepare(batch)
        return self._step

    def _prepare(self, batch: Batch) -> DecodeStep | None:
        slots = [chunk.slot for chunk in batch.chunks]
        decoding = self._decode(
            slots=slots,
            positions=[chunk.position for chunk in batch.chunks],
            last_token_ids=self._last_token_ids,
            state=self._state,
        )
        if decoding is None:
            return None
        wants_logprobs = any(chunk.sequence.request.logprobs.num_output is not None for chunk in batch.chunks)
        kind = None if wants_logprobs else graph_sampling.kind_of(batch.sampled, self._vocab_size)
        rules = None if kind is None else self._rules(batch)
        return DecodeStep(decoding, torch.tensor(slots), rules, is_greedy=kind == "greedy")

    def _rules(self, batch: Batch) -> "Array[DrawRules]":
        wanted = [draw_rules(chunk.sequence.sampling, self._vocab_size) for chunk in batch.chunks]
        return (DrawRules * len(wanted))(*wanted)
