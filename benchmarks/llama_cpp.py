"""llama.cpp on the GGUF file that a model was made from (package llama-cpp-python, in the `bench` extra)."""

import ctypes
import importlib.util
from collections.abc import Sequence
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

    The first one's beginning is read, and copied to the others.
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
        self._context = Context(file, num_rows=num_rows, num_tokens=context + room, num_threads=num_threads)
        self._num_rows, self._position = num_rows, context
        self._context.read(context, row=0)
        for row in range(1, num_rows):
            self._context.copy(0, row)

    def __call__(self) -> None:
        """One step; it is over when the logits are there."""
        self._context.decode([(500, self._position, row) for row in range(self._num_rows)], wants_logits=True)
        self._position += 1


class Prompts:
    """Prompts of given lengths; a call reads all of them from the beginning, to the logits of each last token."""

    def __init__(self, file: Path, *, lengths: Sequence[int], num_threads: int) -> None:
        self._context = Context(file, num_rows=len(lengths), num_tokens=max(lengths), num_threads=num_threads)
        self._lengths = lengths

    def __call__(self) -> None:
        self._context.clear()
        for row, length in enumerate(self._lengths):
            self._context.read(length, row=row, wants_logits=True)


class Context:
    """Keys and values of some conversations, in 16 bits as by default; without flash attention, which is slower."""

    def __init__(self, file: Path, *, num_rows: int, num_tokens: int, num_threads: int) -> None:
        """`num_tokens`: the most of each."""
        import llama_cpp

        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        self._api: Any = llama_cpp
        self._model = self._api.llama_model_load_from_file(str(file).encode(), self._api.llama_model_default_params())
        assert self._model, f"llama.cpp did not load {file}"
        parameters = self._api.llama_context_default_params()
        parameters.n_ctx = num_rows * -(-num_tokens // STREAM_TOKENS) * STREAM_TOKENS
        parameters.n_batch = parameters.n_ubatch = max(READ_TOKENS, num_rows)
        parameters.n_seq_max = num_rows
        parameters.n_threads = parameters.n_threads_batch = num_threads
        parameters.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = self._api.llama_init_from_model(self._model, parameters)
        assert self._context, f"llama.cpp has no room for {num_rows} x {num_tokens} tokens"
        self._batch = self._api.llama_batch_init(max(READ_TOKENS, num_rows), 0, 1)
        self._memory = self._api.llama_get_memory(self._context)

    def __del__(self) -> None:
        if hasattr(self, "_batch"):
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._context)
            self._api.llama_model_free(self._model)

    def clear(self) -> None:
        self._api.llama_memory_clear(self._memory, True)

    def copy(self, row: int, other: int) -> None:
        self._api.llama_memory_seq_cp(self._memory, row, other, -1, -1)

    def read(self, num_tokens: int, *, row: int, wants_logits: bool = False) -> None:
        """So many tokens of a conversation that has none; logits of the last one alone."""
        for begin in range(0, num_tokens, READ_TOKENS):
            places = range(begin, min(num_tokens, begin + READ_TOKENS))
            tokens = [(500 + place % 1000, place, row) for place in places]
            self.decode(tokens, wants_logits=False, wants_last=wants_logits and places.stop == num_tokens)

    def decode(self, tokens: list[tuple[int, int, int]], *, wants_logits: bool, wants_last: bool = False) -> None:
        """Feeds (token, position, conversation)s."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for number, (token, position, row) in enumerate(tokens):
            batch.token[number], batch.pos[number] = token, position
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, row
            batch.logits[number] = wants_logits or (wants_last and number == len(tokens) - 1)
        failed = self._api.llama_decode(self._context, batch)
        assert failed == 0, f"llama.cpp did not decode: {failed}"
        self._api.llama_synchronize(self._context)
