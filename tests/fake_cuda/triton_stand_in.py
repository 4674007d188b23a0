"""In the place of `triton`: a kernel checks what it is launched with, and computes nothing."""

import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

OPTIONS = frozenset(("num_warps", "num_stages", "enable_fp_fusion"))
"""What a launch may say beside a kernel's own arguments."""
DTYPES: dict[str, frozenset[torch.dtype]] = {
    **dict.fromkeys(
        (
            *("slots", "positions", "starts", "first_chunks", "chunk_sequence", "chunk_offset", "ids"),
            *("first_place", "windows", "limits", "token_sequence", "top_k", "tokens"),
        ),
        frozenset((torch.int64,)),
    ),
    **dict.fromkeys(("losers", "sources"), frozenset((torch.int64,))),
    **dict.fromkeys(("near_positions", "candidate_places"), frozenset((torch.int32,))),
    **dict.fromkeys(
        ("frequencies", "ages", "times", "uniforms", "temperatures", "min_p", "top_p"), frozenset((torch.float64,))
    ),
    **dict.fromkeys(
        (
            *("cos", "sin", "cos_sink", "sin_sink", "late_cos", "late_sin", "basis", "nodes", "log_weights"),
            *("log_decay", "table_decay", "table_write", "table_read", "low", "far_up", "mix_bias", "mix_weight"),
            *("normaliser", "near_key_scales", "near_value_scales", "key_scales", "value_scales"),
            *(
                "chunk_normalisers",
                "parts",
                "token_scores",
                "candidate_scores",
                "near_scores",
                "recent_scores",
                "entering",
                "logits",
                "entering_keys",
            ),
        ),
        frozenset((torch.float32,)),
    ),
    "state": frozenset((torch.float32, torch.bfloat16)),
    **dict.fromkeys(
        ("near_keys", "near_values", "rotated", "int8_values", "v"),
        frozenset((torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)),
    ),
    "keys": frozenset((torch.int8,)),
    "values": frozenset((torch.int8, torch.uint8)),
    "codes": frozenset((torch.int8, torch.uint8)),
    **dict.fromkeys(("scales", "minimums"), frozenset((torch.float32, torch.float16))),
}
"""Of a kernel's arguments, by name: what the code that reads them computes with."""
NUMBERS = frozenset((torch.float32, torch.bfloat16, torch.float16))
"""Of all others: activations, weights, and what a kernel writes."""


class WrongLaunchError(Exception):
    """A kernel would be launched with something that it cannot read."""


class constexpr:
    """Annotation of arguments that a kernel is compiled for."""


class Kernel:
    """A jitted function."""

    def __init__(self, function: Callable[..., object], on_launch: Callable[[str], None]) -> None:
        self.name = function.__name__
        self._signature = inspect.signature(function)
        self._on_launch = on_launch

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def launch(*arguments: object, **named: object) -> None:
            own = {name: value for name, value in named.items() if name not in OPTIONS}
            try:
                bound = self._signature.bind(*arguments, **own).arguments
            except TypeError as error:
                raise WrongLaunchError(f"{self.name}: {error}") from error
            if not all(isinstance(size, int) and size > 0 for size in grid):
                raise WrongLaunchError(f"{self.name}: grid {grid}")
            for name, value in bound.items():
                is_constant = self._signature.parameters[name].annotation is constexpr
                # What a layer does not have is never read, and another argument stands for it.
                others = (other for key, other in bound.items() if key != name)
                self._check(name, value, is_constant=is_constant, is_read=all(other is not value for other in others))
            self._on_launch(self.name)

        return launch

    def _check(self, name: str, value: object, *, is_constant: bool, is_read: bool) -> None:
        if not isinstance(value, Tensor):
            if not isinstance(value, int | float) and not (is_constant and isinstance(value, str)):
                raise WrongLaunchError(f"{self.name}: {name} is a {type(value).__name__}")
            return
        if is_constant:
            raise WrongLaunchError(f"{self.name}: {name} is compiled in and cannot be a tensor")
        if value.device != torch.device("cuda", 0):
            raise WrongLaunchError(f"{self.name}: {name} is on {value.device}")
        if is_read and value.dtype not in DTYPES.get(name, NUMBERS):
            raise WrongLaunchError(f"{self.name}: {name} is {value.dtype}")


class _Language(ModuleType):
    """`triton.language`: kernels are never run, so anything may be named."""

    constexpr = constexpr

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **named: None


def install(on_launch: Callable[[str], None]) -> None:
    """Makes `import triton` find the stand-in; `on_launch` is called with the name of every kernel launched."""

    def jit(function: Callable[..., object] | None = None, **options: object) -> Any:
        return (lambda one: Kernel(one, on_launch)) if function is None else Kernel(function, on_launch)

    triton, language, knobs = ModuleType("triton"), _Language("triton.language"), ModuleType("triton.knobs")
    knobs.runtime = type("runtime", (), {"interpret": False})  # type: ignore[attr-defined]
    triton.jit, triton.language, triton.knobs = jit, language, knobs  # type: ignore[attr-defined]
    triton.cdiv = lambda x, y: -(-x // y)  # type: ignore[attr-defined]
    triton.next_power_of_2 = lambda x: 1 << (x - 1).bit_length()  # type: ignore[attr-defined]
    for module in (triton, language, knobs):
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
