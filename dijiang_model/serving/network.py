"""A model whose weights no longer change, with what runs its steps: compiled kernels, Triton's, or torch operations.

That is chosen once, by `freeze`, and never looked at again: the compiled kernels keep pointers to the weights and
values derived from them. A model that is trained is no frozen one; it runs its own `forward`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from ctypes import CDLL
from typing import Literal

import torch
from torch import Tensor

from dijiang_model.batch import PackedBatch
from dijiang_model.config import ModelConfig
from dijiang_model.merged import merge
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops.selection import has_kernels
from dijiang_model.quantization.config import Quantization
from dijiang_model.serving.decoder import NativeDecoder
from dijiang_model.serving.decoding import Decoding
from dijiang_model.serving.weights import why_unsupported
from dijiang_model.state import StateBuffer, StateSpec

DecodePath = Literal["native", "triton", "torch"]


class FrozenModel(ABC):
    """Runs steps of one model; made by `freeze`.

    Attributes:
        config: of the network.
        state_spec: what a slot holds.
        quantization: how weights are quantized; None: they are not.
        num_parameters: numbers in the model, a tied head once.
        device, dtype: of the weights, in a quantized model of those that are not quantized.
        decode_path: what runs steps.
        kernels: which of the compiled kernels run steps, a key of `native.library.VARIANTS`; empty: none of them.
        slow_because: why the compiled kernels do not run a model on a CPU; None: they do, or it is on another device.
        can_defer: whether steps may leave slots uncommitted (`PackedBatch.num_uncommitted`) and commit them
            afterwards, to the same bits.
    """

    decode_path: DecodePath
    can_defer: bool
    kernels: str = ""
    slow_because: str | None = None

    def __init__(self, model: DiJiangForCausalLM) -> None:
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        self.config: ModelConfig = model.config
        self.state_spec: StateSpec = model.state_spec
        self.quantization: Quantization | None = model.quantization
        self.num_parameters: int = model.num_parameters
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self._model = model

    @abstractmethod
    def __call__(self, batch: PackedBatch, state: StateBuffer) -> Tensor:
        """Runs a step, moving the slots of its sequences on in place, but for held ones.

        Returns:
            [R, vocab] fp32 (fp64 for fp64 models): next-token logits of `batch.logit_rows`.

        Raises:
            ValueError: slots are to be held, and `can_defer` is False.
        """

    def decoding(
        self, *, slots: Sequence[int], positions: Sequence[int], last_token_ids: Tensor, state: StateBuffer
    ) -> Decoding | None:
        """The same for sequences that feed their last token, step after step, without an operation on a tensor.

        Returns:
            See `Decoding` for it and for the arguments; None where other than the compiled kernels run steps, or a
            token is more than looked up.
        """
        return None

    def advance(self, counts: Sequence[int], state: StateBuffer) -> None:
        """Moves the slots that the last step has held on, each by its first `counts` tokens; once for each step.

        Raises:
            ValueError: `can_defer` is False.
        """
        raise ValueError("only the compiled kernels can defer commits")


class TensorModel(FrozenModel):
    """Steps as the model's own `forward` runs them: in Triton's kernels where the device has them, else in torch."""

    can_defer = False

    def __init__(self, model: DiJiangForCausalLM, *, slow_because: str | None) -> None:
        super().__init__(model)
        self.decode_path = "triton" if has_kernels(model.device, model.dtype) else "torch"
        self.slow_because = slow_because

    def __call__(self, batch: PackedBatch, state: StateBuffer) -> Tensor:
        return self._model.forward(batch, state)


class NativeModel(FrozenModel):
    """Steps in the compiled kernels: one call for all layers and all rows."""

    decode_path = "native"
    can_defer = True

    def __init__(self, model: DiJiangForCausalLM, *, library: CDLL | None = None) -> None:
        """Takes a model that `why_unsupported` has nothing against, and the best kernels unless others are given."""
        super().__init__(model)
        self._decoder = NativeDecoder(model, library=library)
        self.kernels = self._decoder.kernels

    def __call__(self, batch: PackedBatch, state: StateBuffer) -> Tensor:
        return self._decoder.step(
            self._model.embed(batch.token_ids, batch.positions).float(),
            positions=batch.positions,
            slots=batch.slots,
            lengths=batch.lengths,
            wanted=batch.logit_rows,
            state=state,
            first_uncommitted=batch.num_decode,
            num_uncommitted=batch.num_uncommitted,
        )

    def decoding(
        self, *, slots: Sequence[int], positions: Sequence[int], last_token_ids: Tensor, state: StateBuffer
    ) -> Decoding | None:
        return self._decoder.decoding(slots=slots, positions=positions, last_token_ids=last_token_ids, state=state)

    def advance(self, counts: Sequence[int], state: StateBuffer) -> None:
        self._decoder.advance(counts, state)


def merge_projections(model: DiJiangForCausalLM) -> None:
    """Makes one product of each block's queries, keys and values, and one of its MLP's gate and inner width."""
    paths = model.paths
    for names in ((paths.query, paths.key, paths.value), (paths.mlp_gate, paths.mlp_up)):
        if None not in names:
            for block in model.blocks:
                merge([block.get_submodule(name) for name in names if name is not None], model.quantization)


def freeze(model: DiJiangForCausalLM, *, native: bool = True) -> FrozenModel:
    """Returns a model for running steps; its weights must stay what and where they are from here on.

    Args:
        model: prepared, on the device where it is to run.
        native: whether to run steps in the compiled kernels where they can run this model.
    """
    if not native:
        return TensorModel(model, slow_because="the compiled kernels are switched off")
    if has_kernels(model.device, model.dtype):
        merge_projections(model)
    reason = why_unsupported(model)
    if reason is None:
        return NativeModel(model)
    return TensorModel(model, slow_because=reason if model.device.type == "cpu" else None)
