"""Drives a model step by step as an engine would, on a state buffer whose free slots are poisoned with NaN."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dijiang_model.batch import PackedBatch
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.serving.network import FrozenModel
from dijiang_model.state import StateBuffer

POISON = 0xFF
"""As every byte of a fp64, fp32 or bf16 number: NaN."""


class Stepper:
    """A model and its slots. Every slot holds NaN until `open` clears it; slot 0 stays poisoned.

    Attributes:
        positions: tokens fed so far, by open slot.
    """

    def __init__(self, model: DiJiangForCausalLM | FrozenModel, *, num_slots: int = 8) -> None:
        self.model = model
        self.buffer = StateBuffer(model.state_spec, num_slots)
        self.buffer.storage.fill_(POISON)
        self.positions: dict[int, int] = {}

    def open(self, *slots: int) -> "Stepper":
        for slot in slots:
            self.buffer.storage[slot].zero_()
            self.positions[slot] = 0
        return self

    def step(
        self,
        prefill: Mapping[int, Sequence[int]] | None = None,
        *,
        decode: Mapping[int, int] | None = None,
        num_padding: int = 0,
    ) -> dict[int, Tensor]:
        """One packed step: one token for each slot of `decode`, a segment for each of `prefill`.

        `num_padding` decode rows on scratch slot 0 come between the two, as a fixed-size decode batch has them.

        Returns:
            Logits [tokens of the slot, vocab] by slot.
        """
        rows = [(slot, [token]) for slot, token in (decode or {}).items()]
        rows += [(0, [0])] * num_padding
        num_decode = len(rows)
        rows += [(slot, list(tokens)) for slot, tokens in (prefill or {}).items()]
        starts = [self.positions.get(slot, 0) for slot, _ in rows]
        positions = [start + i for start, (_, tokens) in zip(starts, rows, strict=True) for i in range(len(tokens))]
        batch = PackedBatch(
            token_ids=torch.tensor([token for _, tokens in rows for token in tokens]),
            positions=torch.tensor(positions),
            slots=torch.tensor([slot for slot, _ in rows]),
            lengths=tuple(len(tokens) for _, tokens in rows),
            num_decode=num_decode,
            logit_rows=torch.arange(len(positions)),
        )
        logits = self.model(batch, self.buffer).split(batch.lengths)
        self.positions |= {slot: self.positions[slot] + len(tokens) for slot, tokens in rows if slot != 0}
        return {slot: part for (slot, _), part in zip(rows, logits, strict=True) if slot != 0}

    def state(self, slot: int) -> dict[str, Tensor]:
        """Copies of one slot's tensors."""
        return {name: tensor[slot].clone() for name, tensor in self.buffer.tensors.items()}


def logits_of(model: DiJiangForCausalLM | FrozenModel, token_ids: Sequence[int]) -> Tensor:
    """[T, vocab] of one sequence alone, in one prefill."""
    return Stepper(model, num_slots=2).open(1).step({1: token_ids})[1]


def random_text(num_tokens: int, *, seed: int = 0) -> list[int]:
    """Token ids below 256."""
    return torch.randint(256, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_states_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, tolerance: float) -> None:
    """Tensor by tensor, relative to the tensor's norm."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert_close_in_norm(tensor, expected[name], tolerance=tolerance, what=name)


def assert_close_in_norm(actual: Tensor, expected: Tensor, *, tolerance: float, what: str = "tensor") -> None:
    """|actual - expected| <= tolerance * |expected| (Frobenius), NaN never."""
    assert actual.shape == expected.shape, what
    error, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    assert error <= tolerance * size, f"{what}: {float(error / size):.1e} of the norm, allowed {tolerance:.0e}"
