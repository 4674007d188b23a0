"""Steps of a network whose weights may change in between: in the compiled kernels for as long as it is what they know.

An engine's network is frozen once (`serving.network`). Here others train it, wrap its parts and hook into them, so each
step first looks at what there is: pointers that the kernels keep may be stale, and a wrapped part would not be asked.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dijiang_model.batch import PackedBatch
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.serving.decoder import NativeDecoder
from dijiang_model.serving.weights import why_unsupported
from dijiang_model.state import StateBuffer

_OWN_MODULES = ("dijiang_model.", "torch.nn.modules.")


class Steps:
    """Runs steps of one network; its results are those of an engine where the compiled kernels run both."""

    def __init__(self, network: DiJiangForCausalLM) -> None:
        self._network = network
        self._weights: tuple[tuple[int, int], ...] | None = None
        self._decoder: NativeDecoder | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies know the copied network, and nothing of the kernels' pointers."""
        return Steps, (self._network,)

    @torch.no_grad()
    def __call__(self, batch: PackedBatch, states: StateBuffer, head: Callable[[Tensor], Tensor]) -> Tensor:
        """Moves the states of a batch on.

        Args:
            head: what makes logits of hidden states [R, D], if not the kernels.

        Returns:
            [R, vocab] fp32 (fp64 for fp64 models): of `batch.logit_rows`.
        """
        decoder = self.decoder()
        if decoder is None:
            return head(self._network.hidden_states(batch, states)[-1][batch.logit_rows])
        return decoder.step(
            self._network.embed(batch.token_ids, batch.positions).float(),
            positions=batch.positions,
            slots=batch.slots,
            lengths=batch.lengths,
            wanted=batch.logit_rows,
            state=states,
        )

    def decoder(self) -> NativeDecoder | None:
        """Returns the compiled kernels with the weights as they are now; None where they do not know the network."""
        if not all(_is_own(module) for module in self._network.modules()):
            return None
        weights = tuple((tensor.data_ptr(), tensor._version) for tensor in self._network.parameters())
        if weights != self._weights:
            self._weights = weights
            self._decoder = NativeDecoder(self._network) if why_unsupported(self._network) is None else None
        return self._decoder

    def forget(self) -> None:
        """Looks at all weights anew in the next step."""
        self._weights = self._decoder = None


def _is_own(module: torch.nn.Module) -> bool:
    """Whether a module computes what its class says, and nobody listens."""
    is_hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return type(module).__module__.startswith(_OWN_MODULES) and not is_hooked
