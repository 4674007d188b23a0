"""A CUDA device that keeps the rules of a real one and computes nothing.

Its tensors have a shape, a dtype and a device, and no memory. An operation on tensors of two devices raises, and so
does one that would make the host wait for the device: `.item()`, a mask as an index, a copy from or to memory that is
not pinned. What the host is meant to read is zeros: copied into pinned memory, not waited for, and an event waited for.
"""

import ctypes
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy.typing as npt
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.fake_cuda import triton_stand_in
from tests.fake_cuda.cuda_stand_in import stand_ins

SOURCE = Path(__file__).with_name("guard.cpp")
_aten, _numpy = torch.ops.aten, Tensor.numpy
NO_LAUNCH = frozenset(
    {
        *(_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default),
        *(_aten.detach.default, _aten.lift_fresh.default, _aten._unsafe_view.default, _aten.set_.source_Tensor),
    }
)
"""They make tensors and start nothing on the device."""
INDEXING = frozenset(
    {
        *(_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default),
        *(_aten.index_select.default, _aten.index_copy_.default, _aten.gather.default, _aten.embedding.default),
    }
)


class HiddenSyncError(Exception):
    """The host would wait for the device, or the device for the host, where nobody wrote that down."""


class CaptureError(Exception):
    """Something that no captured graph may hold."""


def build_guard(folder: Path) -> Path:
    """Compiles `guard.cpp` against torch's own headers, in a few seconds; the library that `Machine` takes.

    Raises:
        OSError: there is no C++ compiler.
        subprocess.CalledProcessError: it fails.
    """
    root, library = Path(torch.__file__).parent, folder / "guard.so"
    command = ["c++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}", str(SOURCE), "-o", str(library)]
    subprocess.run([*command, f"-L{root / 'lib'}", "-lc10"], check=True, capture_output=True, text=True)
    return library


class Machine:
    """The device. Inside `with machine` tensors on `cuda` are its own.

    Attributes:
        launches: what was started on the device, by name; a graph's when it was captured, and one for each replay.
        is_capturing: a graph is captured.
    """

    def __init__(self, guard: Path) -> None:
        """Takes what `build_guard` has made."""
        ctypes.CDLL(str(guard))
        self.launches: Counter[str] = Counter()
        self.is_capturing = False
        self._is_loading = False
        self._is_busy = False
        self._pinned: dict[int, Tensor] = {}
        self._arriving: dict[int, Tensor] = {}
        self._modes = FakeTensorMode(allow_non_fake_inputs=True), _Watch(self)
        self._replaced: list[tuple[Any, str, object]] = []
        triton_stand_in.install(self.launched)
        torch.utils._device._device_constructors()  # remembers the true `torch.empty`

    def __enter__(self) -> "Machine":
        self._modes[0].__enter__()  # before a device shows up, for this mode has one of its own where there is none
        for owner, name, value in stand_ins(self):
            self._replaced.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)
        self._modes[1].__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._modes[1].__exit__(kind, error, traceback)
        while self._replaced:
            setattr(*self._replaced.pop())
        self._modes[0].__exit__(kind, error, traceback)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While a model is loaded the host may wait."""
        self._is_loading = True
        try:
            yield
        finally:
            self._is_loading = False

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """While a graph is captured nobody may wait, nor copy."""
        self.is_capturing = True
        try:
            yield
        finally:
            self.is_capturing = False

    def reset(self) -> None:
        """Forgets what an engine that has failed left under way."""
        self._arriving.clear()
        self.is_capturing = self._is_busy = False

    def launched(self, name: str) -> None:
        """Something was started on the device."""
        self.launches[name] += 1
        self._is_busy = True

    def waited_for(self) -> None:
        """The host has waited for all that was started.

        Raises:
            CaptureError: while a graph is captured.
        """
        if self.is_capturing:
            raise CaptureError("a captured graph cannot wait")
        self._arriving.clear()
        self._is_busy = False

    def pin(self, tensor: Tensor) -> Tensor:
        """Takes a tensor's memory for pinned from here on; returns the tensor."""
        assert not tensor.is_cuda
        self._pinned[_key(tensor)] = tensor
        return tensor

    def under_way(self) -> list[int]:
        """Copies to the host that were not waited for yet."""
        return list(self._arriving)

    def arrived(self, copies: list[int]) -> None:
        """These copies were waited for."""
        for key in copies:
            self._arriving.pop(key, None)

    def numbers(self, tensor: Tensor) -> npt.NDArray[Any]:
        """What the host reads of a tensor.

        Raises:
            HiddenSyncError: it is on the device, or on its way.
        """
        if tensor.is_cuda and (self.is_capturing or not self._is_loading):
            self._refuse("the host reads numbers of the device")
        if _key(tensor) in self._arriving:
            raise HiddenSyncError("the host reads what may not have arrived")
        with _disable_current_modes():
            if not isinstance(tensor, FakeTensor):
                return _numpy(tensor.detach())
            made_up = torch.ones if self._is_loading else torch.zeros  # who loads asks whether all is well
            return _numpy(made_up(tensor.shape, dtype=tensor.dtype))

    def check_copy(self, source: Tensor, target: Tensor | None, device: torch.device, *, is_waited_for: bool) -> None:
        """Copies between host and device are asynchronous, from and to pinned memory.

        Args:
            target: None: it is made by the copy.
            device: of the target.

        Raises:
            CaptureError, HiddenSyncError: this one is not.
        """
        if device.type == source.device.type or source.numel() == 0:
            return
        if self.is_capturing:
            raise CaptureError("a captured graph would copy to or from the host")
        if self._is_loading:
            return
        if source.is_cuda:
            if target is not None and _key(target) in self._pinned and not is_waited_for:
                self._arriving[_key(target)] = target
            elif self._is_busy:
                self._refuse("a copy to the host waits for the device")
        elif is_waited_for or _key(source) not in self._pinned:
            self._refuse(f"a copy of {list(source.shape)} to the device from memory that is not pinned")

    def _refuse(self, what: str) -> NoReturn:
        if self.is_capturing:
            raise CaptureError(what)
        raise HiddenSyncError(what)


class _Watch(TorchDispatchMode):
    """Sees every operation before it is done."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func is _aten.rms_norm.default:  # one kernel on a device
            self._machine.launched("rms_norm")
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                answer = func.decompose(*args, **kwargs)
            if answer is not NotImplemented:
                return answer
        if func is _aten._local_scalar_dense.default:
            return self._machine.numbers(args[0]).item()
        tensors = [one for one in _flat((args, kwargs)) if isinstance(one, Tensor)]
        is_asynchronous = bool(kwargs.get("non_blocking"))
        if func is _aten.copy_.default:
            is_asynchronous |= len(args) > 2 and args[2]
            self._machine.check_copy(args[1], args[0], args[0].device, is_waited_for=not is_asynchronous)
        elif func is _aten._to_copy.default:
            device = torch.device(kwargs.get("device") or args[0].device)
            self._machine.check_copy(args[0], None, device, is_waited_for=not is_asynchronous)
        elif func in INDEXING and tensors[0].is_cuda and any(not one.is_cuda and one.ndim > 0 for one in tensors):
            raise HiddenSyncError(f"{func} with indices on the host")
        answer = func(*args, **kwargs)
        made = [one for one in _flat(answer) if isinstance(one, Tensor)]
        if func not in NO_LAUNCH and not _is_view(func) and any(one.is_cuda for one in (*tensors, *made)):
            self._machine.launched(func.name().removeprefix("aten::"))
        return answer


def _key(tensor: Tensor) -> int:
    """The same for all views of one piece of memory."""
    return tensor.untyped_storage()._cdata


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _flat(one)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


def _is_view(func: Any) -> bool:
    return any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
