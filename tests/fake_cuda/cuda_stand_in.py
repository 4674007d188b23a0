"""In the place of `torch.cuda`, and of what else of torch needs a device or memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tests.fake_cuda.triton_stand_in import WrongLaunchError

if TYPE_CHECKING:
    from tests.fake_cuda.machine import Machine

CAPABILITY = (9, 0)
MEMORY_BYTES = 2**36


def stand_ins(machine: "Machine") -> list[tuple[Any, str, object]]:
    """(owner, name, stand-in) of everything that is replaced while a machine is at work.

    But for `torch.cuda.is_available`, which tensors without memory ask what device they may touch.
    """
    stream = _stream(machine)()
    values: dict[str, Callable[..., object]] = {
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_name": lambda device=None: "no GPU",
        "mem_get_info": lambda device=None: (MEMORY_BYTES, MEMORY_BYTES),
        "current_stream": lambda device=None: stream,
        "stream": lambda one: nullcontext(),
        "device": lambda one: nullcontext(),
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: machine.waited_for(),
        "graph_pool_handle": lambda: (0, 0),
        "graph": lambda *arguments, **named: _capture(machine),
        "is_current_stream_capturing": lambda: machine.is_capturing,
        "Event": _event(machine),
        "Stream": _stream(machine),
        "CUDAGraph": _graph(machine),
    }
    return [*((torch.cuda, name, value) for name, value in values.items()), *_of_tensors(machine)]


def _of_tensors(machine: "Machine") -> list[tuple[Any, str, object]]:
    empty, data_ptr = torch.empty, Tensor.data_ptr

    def make_empty(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        made = empty(*size, **options)
        return machine.pin(made) if pin_memory else made

    def pinned(tensor: Tensor) -> Tensor:
        return machine.pin(torch.empty_like(tensor).copy_(tensor))

    def as_numpy(tensor: Tensor, **options: Any) -> Any:
        return machine.numbers(tensor)

    def address(tensor: Tensor) -> int:
        if isinstance(tensor, FakeTensor):
            raise WrongLaunchError("something computes on the memory of a tensor of the device")
        return data_ptr(tensor)

    return [
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch, "empty", make_empty),
        (Tensor, "pin_memory", pinned),
        (Tensor, "numpy", as_numpy),
        (Tensor, "data_ptr", address),
    ]


def _event(machine: "Machine") -> type:
    class Event:
        def __init__(self, *arguments: object, **named: object) -> None:
            self._copies: list[int] = []

        def record(self, stream: object = None) -> None:
            self._copies = machine.under_way()

        def synchronize(self) -> None:
            machine.arrived(self._copies)

    return Event


def _stream(machine: "Machine") -> type:
    class Stream:
        def wait_stream(self, other: object) -> None:
            """Streams of this machine work in order."""

        def synchronize(self) -> None:
            machine.waited_for()

    return Stream


def _graph(machine: "Machine") -> type:
    class Graph:
        def replay(self) -> None:
            machine.launched("replay")

    return Graph


def _capture(machine: "Machine") -> AbstractContextManager[None]:
    return machine.capturing()
