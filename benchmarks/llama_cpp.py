"""llama.cpp on the GGUF file that a model was made from (package llama-cpp-python, in the `bench` extra)."""

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dijiang_model.conversion.default_model import GGUF_FILE, PACKAGE

KINDS = {"F32": 0, "Q8_0": 7}
"""llama.cpp's numbers of file types."""
CLASSES = {"fp32": "F32", "int8": "Q8_0"}
"""What stands beside each kind of our weights; the file as it is has no counterpart and is shown for orientation."""


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _LOG(lambda level, text, data: None)


def is_available() -> bool:
    """Whether llama.cpp can be run here."""
    return importlib.util.find_spec("llama_cpp") is not None


def default_gguf() -> Path | None:
    """The file that the default model was made from, if its package is installed; the package is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        return None
    return Path(spec.submodule_search_locations[0]) / GGUF_FILE


def files_of(source: Path, folder: Path, wanted: list[str], *, num_threads: int) -> dict[str, Path]:
    """The same weights in each of llama.cpp's types, written to a folder, and the file as it is."""
    files = {
        kind: requantised(source, folder / f"{kind}.gguf", KINDS[kind], num_threads=num_threads) for kind in wanted
    }
    return {**files, source.stem.rpartition(".")[2]: source}


def requantised(source: Path, target: Path, kind: int, *, num_threads: int) -> Path:
    """The same weights in another of llama.cpp's types."""
    import llama_cpp

    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))  # it names every tensor
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize, parameters.nthread = kind, True, num_threads
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters)
    assert failed == 0, f"llama.cpp did not quantise {source}"
    return target


def decode_step(file: Path, *, context: int, num_threads: int, room: int) -> Callable[[], object]:
    """One decode step of one conversation behind `context` tokens; its cache has room for `room` more."""
    import llama_cpp

    model: Any = llama_cpp.Llama(
        str(file), n_ctx=context + room, n_threads=num_threads, n_threads_batch=num_threads, verbose=False
    )
    model.eval([500 + i % 1000 for i in range(context)])
    return lambda: model.eval([500])
