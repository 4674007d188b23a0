"""Loads the compiled kernels and describes their structures.

`setup.py` compiles `src/` once for each kind of CPU it may meet; the best one that this CPU runs
is loaded. The build is optional: without a compiler there is no library and everything runs in torch.
"""

import ctypes
import logging
import platform
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from dijiang_model.native.digest import source_digest

_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni", "fma", "bmi2"})
VARIANTS: dict[str, frozenset[str]] = {
    "avx512bf16": _AVX512 | {"avx512_bf16"},
    "avx512": _AVX512,
    "avx2": frozenset({"avx2", "fma", "bmi2", "f16c"}),
    "base": frozenset(),
}
"""Best first: the CPU flags that each needs (x86; other CPUs have `base` alone)."""

SOURCES = Path(__file__).parent / "src"
_log = logging.getLogger(__name__)
_CPU_INFO = Path("/proc/cpuinfo")

Pointer = ctypes.c_void_p
Integer = ctypes.c_int64


class Matrix(ctypes.Structure):
    """A projection: fp32 or bf16 weights, int8 codes with a scale per output, or int4 codes with scales of groups."""

    _fields_ = (
        ("weight", Pointer),
        ("halves", Pointer),
        ("codes", Pointer),
        ("scales", Pointer),
        ("pairs", Pointer),
        ("group_scales", Pointer),
        ("group_minimums", Pointer),
        ("bias", Pointer),
        ("rows", Integer),
        ("columns", Integer),
        ("group_size", Integer),
    )


class Norm(ctypes.Structure):
    """Layer norm; RMS norm without a bias."""

    _fields_ = (("weight", Pointer), ("bias", Pointer), ("eps", ctypes.c_double))


class Attention(ctypes.Structure):
    """What stands between a layer's projections; see `src/attention.h`."""

    _fields_ = (
        ("basis", Pointer),
        ("nodes", Pointer),
        ("log_weights", Pointer),
        ("decay", Pointer),
        ("late", Pointer),
        ("table_write", Pointer),
        ("table_read", Pointer),
        ("mix_bias", Pointer),
        ("mix_weight", Pointer),
        ("late_cos", Pointer),
        ("late_sin", Pointer),
        ("far_up", Pointer),
        ("first_place", Pointer),
        ("windows", Pointer),
        ("log_decay", Pointer),
        ("frequencies", Pointer),
        ("age", ctypes.c_double),
        ("grid", ctypes.c_double),
        ("span", Integer),
        ("value_bits", Integer),
        ("far_rank", Integer),
        ("table_entries", Integer),
        ("num_features", Integer),
        ("window", Integer),
        ("sinks", Integer),
        ("is_softmax", Integer),
        ("has_denominator", Integer),
        ("exact_numbers", Integer),
        ("linear_numbers", Integer),
        ("state_offset", Integer),
        ("normaliser_offset", Integer),
        ("keys_offset", Integer),
        ("values_offset", Integer),
        ("key_scales_offset", Integer),
        ("value_scales_offset", Integer),
        ("positions_offset", Integer),
        ("scores_offset", Integer),
        ("recent_offset", Integer),
    )


class Heads(ctypes.Structure):
    """Head counts, and where each head lies in the projected row."""

    _fields_ = (
        ("num_heads", Integer),
        ("num_groups", Integer),
        ("head_size", Integer),
        ("rotary_half", Integer),
        ("query_start", Integer),
        ("query_step", Integer),
        ("key_start", Integer),
        ("key_step", Integer),
        ("value_start", Integer),
        ("value_step", Integer),
        ("score_start", Integer),
        ("num_scores", Integer),
    )


class Layer(ctypes.Structure):
    """One block of the network."""

    _fields_ = (
        ("input_norm", Norm),
        ("mlp_norm", Norm),
        ("query", Matrix),
        ("key", Matrix),
        ("value", Matrix),
        ("gate", Matrix),
        ("group_norm", Norm),
        ("output", Matrix),
        ("mlp_gate", Matrix),
        ("mlp_up", Matrix),
        ("mlp_down", Matrix),
        ("attention", Attention),
        ("far_down", Matrix),
        ("priority", Matrix),
        ("query_norm", Norm),
        ("key_norm", Norm),
        ("attention_output_norm", Norm),
        ("mlp_output_norm", Norm),
        ("is_local", Integer),
        ("norms_all_heads", Integer),
    )


class Network(ctypes.Structure):
    """The whole network."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("num_layers", Integer),
        ("final_norm", Norm),
        ("head", Matrix),
        ("heads", Heads),
        ("frequencies", Pointer),
        ("local_frequencies", Pointer),
        ("hidden_size", Integer),
        ("inner_size", Integer),
        ("last_sink_position", Integer),
        ("activation", Integer),
        ("is_parallel", Integer),
    )


class DrawRules(ctypes.Structure):
    """How one row's token is drawn."""

    _fields_ = (
        ("uniform", ctypes.c_double),
        ("temperature", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("top_k", Integer),
        ("top_p", ctypes.c_double),
    )


@cache
def load_library() -> ctypes.CDLL | None:
    """The best kernels that were built and that this CPU runs; None when there are none."""
    for variant in VARIANTS:
        library = load_variant(variant)
        if library is not None:
            return library
    return None


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
    words: dict[str, str] = {}
    for variant, flags in VARIANTS.items():
        missing = sorted(flags - _processor_flags())
        if missing:
            words[variant] = f"this CPU lacks {', '.join(missing)}"
        elif "used" in words.values():
            words[variant] = "not needed: a better one is used"
        elif not _path(variant).exists():
            words[variant] = "not compiled"
        else:
            words[variant] = "built from other sources" if load_variant(variant) is None else "used"
    return words


def _path(variant: str) -> Path:
    """A name with the interpreter's tag, so that a library which another Python built is left alone."""
    return Path(__file__).parent / f"_kernels_{variant}{EXTENSION_SUFFIXES[0]}"


def load_variant(variant: str) -> ctypes.CDLL | None:
    """The kernels of one key of `VARIANTS`; None if they were not built or this CPU lacks something."""
    if not VARIANTS[variant] <= _processor_flags():
        return None
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
