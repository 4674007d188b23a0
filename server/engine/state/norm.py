"""The size of a state on its device."""

import torch
from torch import Tensor

from dijiang_model.state import StateBuffer


class StateNorm:
    """Measures slots of a buffer, one at a time; see `server.engine.state.watch.StateProbe`."""

    def __init__(self, buffer: StateBuffer) -> None:
        tensors = buffer.tensors
        scales = {name: _scales_of(name) for name in tensors if _scales_of(name) in tensors}
        self._coded = [(tensors[codes], tensors[factors]) for codes, factors in scales.items()]
        scores = {name for name in tensors if name.endswith("_scores")}  # of priorities: no part of what is remembered
        apart = {*scales, *scales.values(), *scores}
        self._tensors = [tensor for name, tensor in tensors.items() if tensor.is_floating_point() and name not in apart]
        self._is_cuda = buffer.storage.is_cuda
        self._on_host: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    @torch.inference_mode()
    def launch(self, slot: int) -> None:
        """Starts measuring; on a CPU it is done on return."""
        # fp64: squares of finite numbers stay finite, so that only a state that is not gives infinity.
        norms = [torch.linalg.vector_norm(tensor[slot], dtype=torch.float64) for tensor in self._tensors]
        for codes, scales in self._coded:
            rows = torch.linalg.vector_norm(codes[slot].double(), dim=-1)
            norms.append(torch.linalg.vector_norm(rows * scales[slot]))
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=torch.float64)
        if not self._is_cuda:
            self._on_host = norm
            return
        self._on_host = torch.empty((), dtype=torch.float64, pin_memory=True).copy_(norm, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def collect(self) -> float:
        """The L2 norm of all numbers of the slot, of rows in int8 by what they stand for."""
        assert self._on_host is not None
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._on_host)


def _scales_of(name: str) -> str:
    """`near_key_scales` of `near_keys`: the name that `StateSpec` would have for the scales of its rows."""
    return f"{name.removesuffix('s')}_scales"
