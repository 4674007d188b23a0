"""The size of a state on its device."""

import torch
from torch import Tensor

from dijiang_model.state import StateBuffer


class StateNorm:
    """Measures slots of a buffer, one at a time; see `server.engine.state_watch.StateProbe`."""

    def __init__(self, buffer: StateBuffer) -> None:
        self._tensors = [tensor for tensor in buffer.tensors.values() if tensor.is_floating_point()]
        self._is_cuda = buffer.storage.is_cuda
        self._on_host: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    @torch.inference_mode()
    def launch(self, slot: int) -> None:
        """Starts measuring; on a CPU it is done on return."""
        # fp64: squares of finite numbers stay finite, so that only a state that is not gives infinity.
        norms = [torch.linalg.vector_norm(tensor[slot], dtype=torch.float64) for tensor in self._tensors]
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=torch.float64)
        if not self._is_cuda:
            self._on_host = norm
            return
        self._on_host = torch.empty((), dtype=torch.float64, pin_memory=True).copy_(norm, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def collect(self) -> float:
        """The L2 norm of all floating-point numbers of the slot."""
        assert self._on_host is not None
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._on_host)
