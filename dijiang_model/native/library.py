"""Loads the compiled kernels and describes their structures.

`setup.py` compiles `src/` once for each kind of CPU it may meet; of those that this CPU runs, the one that is fastest
here is loaded. The build is optional: without a compiler there is no library and everything runs in torch.
"""

import ctypes
import logging
import platform
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from dijiang_model.native.digest import source_digest
from dijiang_model.native.structures import DrawRules, Integer, Layer, Network, Pointer
from dijiang_model.native.timing import fastest

_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni", "fma", "bmi2"})
VARIANTS: dict[str, frozenset[str]] = {
    "amx": _AVX512 | {"amx_tile", "amx_int8", "amx_bf16"},
    "avx512bf16": _AVX512 | {"avx512_bf16"},
    "avx512": _AVX512,
    "avx2": frozenset({"avx2", "fma", "bmi2", "f16c"}),
    "base": frozenset(),
}
"""Usually the fastest first: the CPU flags that each needs (x86; other CPUs have `base` alone)."""

MEASURED = ("avx512", "avx512bf16", "amx")
"""Which units for matrices are worth it differs from processor to processor, so these are timed, the plainest first."""

_NOT_COMPILED, _OTHER_SOURCES = "not compiled", "built from other sources"
MENDED_BY_BUILDING = (_NOT_COMPILED, _OTHER_SOURCES)
"""What `variants_in_words` says of kernels that would be there after a build."""

SOURCES = Path(__file__).parent / "src"
_log = logging.getLogger(__name__)
_CPU_INFO = Path("/proc/cpuinfo")


@cache
def load_library() -> ctypes.CDLL | None:
    """The fastest kernels that were built and that this CPU runs; None when there are none.

    Where there is a choice among `MEASURED` they are timed, once a process: a few milliseconds.
    """
    measured = {variant: library for variant in MEASURED if (library := load_variant(variant)) is not None}
    if measured:
        return measured[fastest(measured)]
    return next((library for variant in VARIANTS if (library := load_variant(variant)) is not None), None)


def variant_of(library: ctypes.CDLL) -> str:
    """Which of `VARIANTS` a library of ours is."""
    return Path(library._name).name.removeprefix("_kernels_").partition(".")[0]


def why_missing() -> str | None:
    """Why `load_library` finds nothing, and what to do about it, in words for operators; None: it finds something."""
    if load_library() is not None:
        return None
    if any(_path(variant).exists() for variant in VARIANTS):
        reason = "the compiled kernels were built from other sources than those at hand"
    else:
        reason = "the kernels were not compiled when this was installed, or not for this interpreter and CPU"
    return f"{reason}; `make kernels` (or `python setup.py build_ext --inplace`), which needs a C++ compiler, mends it"


def variants_in_words() -> dict[str, str]:
    """Returns for each of `VARIANTS` that it is `used`, or why not."""
    library = load_library()
    used = None if library is None else variant_of(library)
    return {variant: _in_words(variant, used) for variant in VARIANTS}


def _in_words(variant: str, used: str | None) -> str:
    missing = sorted(VARIANTS[variant] - _processor_flags())
    if missing:
        return f"this CPU lacks {', '.join(missing)}"
    if variant == used:
        return "used"
    order = list(VARIANTS)
    if used is not None and order.index(variant) > order.index(used):
        return "not needed: a better one is used"
    if not _path(variant).exists():
        return _NOT_COMPILED
    if load_variant(variant) is not None:
        return "not needed: another one is faster on this CPU"
    return _OTHER_SOURCES if _loaded(variant) is None else "this CPU or its system keeps the matrix unit"


def _path(variant: str) -> Path:
    """A name with the interpreter's tag, so that a library which another Python built is left alone."""
    return Path(__file__).parent / f"_kernels_{variant}{EXTENSION_SUFFIXES[0]}"


def load_variant(variant: str) -> ctypes.CDLL | None:
    """The kernels of one key of `VARIANTS`; None if they were not built or this CPU or its system lacks something."""
    if not VARIANTS[variant] <= _processor_flags():
        return None
    library = _loaded(variant)
    return library if library is not None and library.dijiang_is_ready() == 1 else None


def _loaded(variant: str) -> ctypes.CDLL | None:
    """The library of a variant, whether or not it may run."""
    path = _path(variant)
    if not path.exists():
        return None
    library = ctypes.CDLL(str(path))
    if not _is_of_these_sources(library):
        _log.warning("%s was built from other sources and is not used; `make kernels` builds it again", path.name)
        return None
    _declare(library)
    return library


def _is_of_these_sources(library: ctypes.CDLL) -> bool:
    if not hasattr(library, "dijiang_source"):
        return False
    library.dijiang_source.restype = ctypes.c_char_p
    built_from: bytes = library.dijiang_source()
    return built_from.decode() == source_digest(SOURCES)


@cache
def _processor_flags() -> frozenset[str]:
    if platform.machine().lower() not in ("x86_64", "amd64") or not _CPU_INFO.exists():
        return frozenset()
    for line in _CPU_INFO.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def _declare(library: ctypes.CDLL) -> None:
    """Argument types, and a check that both sides lay the structures out alike."""
    for name, structure in (("model", Network), ("layer", Layer), ("draw", DrawRules)):
        size = getattr(library, f"dijiang_sizeof_{name}")
        size.restype = Integer
        found = size()
        assert found == ctypes.sizeof(structure), (
            f"{name}: {found} bytes in the library, {ctypes.sizeof(structure)} here"
        )
    library.dijiang_step.argtypes = (
        *(Pointer, Pointer, Pointer, Integer),  # model, hidden, positions, rows
        *(Pointer, Pointer, Integer),  # slots, lengths, sequences
        *(Pointer, Integer),  # storage, bytes of a slot
        *(Pointer, Integer, Pointer),  # wanted rows, how many, logits
        *(Integer, Integer, Pointer),  # the first uncommitted sequence, how many, what is kept of them
        ctypes.c_int,  # threads
    )
    library.dijiang_advance.argtypes = (
        *(Pointer, Pointer, Pointer, Integer),  # model, what was kept, positions, rows
        *(Pointer, Pointer, Pointer, Integer),  # slots, lengths, counts, sequences
        *(Pointer, Integer),  # storage, bytes of a slot
        ctypes.c_int,  # threads
    )
    library.dijiang_decode.argtypes = (
        *(Pointer, Pointer, Pointer, Pointer),  # model, token table, last tokens by slot, positions
        *(Pointer, Pointer, Pointer, Integer),  # slots, row numbers, ones, rows
        *(Pointer, Integer),  # storage, bytes of a slot
        *(Pointer, Pointer, Pointer),  # hidden, logits, chosen tokens or none
        ctypes.c_int,  # threads
    )
    library.dijiang_linear.argtypes = (Pointer, Pointer, Integer, Pointer, ctypes.c_int)
    library.dijiang_greedy.argtypes = (Pointer, Integer, Integer, Pointer, ctypes.c_int)
    library.dijiang_greedy.restype = None
    library.dijiang_draw.argtypes = (Pointer, Integer, Integer, ctypes.POINTER(DrawRules), Pointer, ctypes.c_int)
