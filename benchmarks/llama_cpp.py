"""llama.cpp on the GGUF file that a model was made from (package llama-cpp-python, in the `bench` extra)."""

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

from dijiang_model.conversion.default_model import GGUF_FILE, PACKAGE

KINDS = {"F32": 0, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""llama.cpp's numbers of file types."""
CLASSES = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
"""What stands beside each kind of our weights; the file as it is has no counterpart and is shown for orientation."""
STREAM_TOKENS = 256
"""llama.cpp gives each conversation a multiple of so many."""
READ_TOKENS = 512

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


class Conversations:
    """Conversations of equal length in one context of llama.cpp's; a call decodes one token of each.

    The first one's beginning is read, and copied to the others. Keys and values are kept in 16 bits, as by default;
    without flash attention, which takes longer here.
    """

    def __init__(self, file: Path, *, num_rows: int, context: int, num_threads: int, room: int) -> None:
        """
        Args:
            file: of the model.
            num_rows: conversations.
            context: tokens of each so far.
            num_threads: of all work.
            room: tokens that may follow in each.
        """
        import llama_cpp

        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        self._api: Any = llama_cpp
        self._model = self._api.llama_model_load_from_file(str(file).encode(), self._api.llama_model_default_params())
        assert self._model, f"llama.cpp did not load {file}"
        parameters = self._api.llama_context_default_params()
        parameters.n_ctx = num_rows * -(-(context + room) // STREAM_TOKENS) * STREAM_TOKENS
        parameters.n_batch = parameters.n_ubatch = max(READ_TOKENS, num_rows)
        parameters.n_seq_max = num_rows
        parameters.n_threads = parameters.n_threads_batch = num_threads
        parameters.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = self._api.llama_init_from_model(self._model, parameters)
        assert self._context, f"llama.cpp has no room for {num_rows} x {context} tokens"
        self._batch = self._api.llama_batch_init(max(READ_TOKENS, num_rows), 0, 1)
        self._num_rows, self._position = num_rows, context
        for begin in range(0, context, READ_TOKENS):
            places = range(begin, min(context, begin + READ_TOKENS))
            self._decode([(500 + place % 1000, place, 0) for place in places])
        memory = self._api.llama_get_memory(self._context)
        for row in range(1, num_rows):
            self._api.llama_memory_seq_cp(memory, 0, row, -1, -1)

    def __call__(self) -> None:
        """One step; it is over when the logits are there."""
        self._decode([(500, self._position, row) for row in range(self._num_rows)], with_logits=True)
        self._position += 1

    def __del__(self) -> None:
        if hasattr(self, "_batch"):
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._context)
            self._api.llama_model_free(self._model)

    def _decode(self, tokens: list[tuple[int, int, int]], *, with_logits: bool = False) -> None:
        """Feeds (token, position, conversation)s."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for number, (token, position, row) in enumerate(tokens):
            batch.token[number], batch.pos[number] = token, position
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, row
            batch.logits[number] = with_logits
        failed = self._api.llama_decode(self._context, batch)
        assert failed == 0, f"llama.cpp did not decode: {failed}"
        self._api.llama_synchronize(self._context)
