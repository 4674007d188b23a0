"""What a user would run instead, as decode steps to time: HF transformers in four ways, and llama.cpp.

`hf` is HF's model, in each kind of weights, with its dynamic and its static cache; `hf-compiled` the static cache under
`torch.compile`; `hf-continuous` its continuous batching (`generate_batch`), timed by its own account of when tokens
came, for it steps in a thread of its own; `llama.cpp` the GGUF file that the model was made from, read in full before
it is timed.
"""

import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch

from benchmarks import llama_cpp
from benchmarks.contenders import has_transformers_twin
from benchmarks.machine import COMPILED, CONTINUOUS, HF, LLAMA_CPP, is_cuda, synchronised
from benchmarks.transformers_twin import CacheKind, Compiled, decode_step, token_times, twins_of
from dijiang_model.checkpoints.checkpoint import load_quantization
from dijiang_model.config import ModelConfig

CACHES: tuple[CacheKind, ...] = ("dynamic", "static")
SHARE_OF_MEMORY = 0.6

Step = Callable[[], object]


class TooLongError(Exception):
    """It took longer than it may."""


@dataclass(slots=True)
class Rivals:
    """Who is measured beside ours.

    Attributes:
        names: of `machine.RIVALS`.
        twins: HF's model on the same weights, by their kind; empty: none of its ways.
        files: llama.cpp's, by type; empty: without it.
        cache_bytes: of one token in HF's caches, in fp32.
        device, num_threads: of all.
        limit_s: most seconds for compiling, and for a run of continuous batching.
        max_read_tokens: longest context that is read for llama.cpp, which starts from no made-up cache.
        note: takes a sentence about what is left out.
    """

    names: tuple[str, ...]
    twins: Mapping[str, Any]
    files: Mapping[str, Path]
    cache_bytes: int
    device: str
    num_threads: int
    limit_s: float
    max_read_tokens: int
    note: Callable[[str], None]

    def steps(self, num_rows: int, context: int, *, room: int) -> dict[str, Step]:
        """Steps that can be timed in turn with others; `room`: how many will be taken at most."""
        return {**self._hf_steps(num_rows, context, room), **self._llama_cpp_steps(num_rows, context, room)}

    def token_times(self, num_rows: int, context: int, *, num_rounds: int) -> dict[str, list[float]]:
        """Seconds between tokens of those that step by themselves."""
        if CONTINUOUS not in self.names or not self._fits(num_rows, context):
            return {}
        found = {}
        for kind, twin in self.twins.items():
            try:
                with time_limit(self.limit_s):
                    times = token_times(twin, num_rows=num_rows, num_tokens=context, num_times=num_rounds)
            except Exception as error:  # whatever it raises is what is to be told
                self.note(f"Without HF's continuous batching at {num_rows} x {context:,}: {_in_words(error)}")
            else:
                found[f"HF {kind} continuous"] = times
        return found

    def _hf_steps(self, num_rows: int, context: int, room: int) -> dict[str, Step]:
        if not self.twins or not self._fits(num_rows, context):
            return {}
        shape = {"num_rows": num_rows, "num_tokens": context, "num_steps": room}
        steps: dict[str, Step] = {}
        for kind, twin in self.twins.items():
            for cache in CACHES if HF in self.names else ():
                steps[f"HF {kind} {cache}"] = synchronised(decode_step(twin, kind=cache, **shape), self.device)
            if COMPILED not in self.names:
                continue
            try:
                step = synchronised(decode_step(Compiled(twin), kind="static", **shape), self.device)
                with time_limit(self.limit_s), torch.inference_mode():
                    step()
                steps[f"HF {kind} compiled"] = step
            except Exception as error:
                self.note(f"Without HF's compiled static cache at {num_rows} x {context:,}: {_in_words(error)}")
        return steps

    def _llama_cpp_steps(self, num_rows: int, context: int, room: int) -> dict[str, Step]:
        if context > self.max_read_tokens and self.files:
            self.note(f"Without llama.cpp at {context:,}: it would have to read that much (--most-read)")
            return {}
        return {
            f"llama.cpp {name}": llama_cpp.Conversations(
                file, num_rows=num_rows, context=context, num_threads=self.num_threads, room=room
            )
            for name, file in self.files.items()
        }

    def _fits(self, num_rows: int, context: int) -> bool:
        """Whether HF's caches, one for each way, leave the machine some memory."""
        if is_cuda(self.device):
            return True
        num_caches = sum(len(CACHES) if name == HF else 1 for name in self.names if name != LLAMA_CPP)
        needed = max(len(self.twins), 1) * num_caches * num_rows * context * self.cache_bytes
        if needed <= SHARE_OF_MEMORY * psutil.virtual_memory().available:
            return True
        self.note(f"Without HF at {num_rows} x {context:,}: its caches would take {needed / 2**30:.0f} GiB")
        return False


def twins_at(folder: Path, models: Mapping[str, Any], note: Callable[[str], None]) -> dict[str, Any]:
    """HF's models on the base weights of ours, by kind; none, and a sentence, where HF's configuration is not known."""
    if not has_transformers_twin(folder):
        note("Without HF: its model is made of the LLaMA family's configuration, which is not at hand.")
        return {}
    if (stored := load_quantization(folder)) is not None:
        note(f"Without HF: it needs the weights before they were rounded to {stored.weights}.")
        return {}
    return twins_of(folder, models)


@dataclass(frozen=True, slots=True)
class Where:
    """Where rivals run.

    Attributes:
        device, num_threads: of all.
        note: takes a sentence about what is left out.
        keep: files that are made for them are deleted when it is closed.
    """

    device: str
    num_threads: int
    note: Callable[[str], None]
    keep: ExitStack


def files_for(model: Path | None, gguf: Path | None, kinds: Sequence[str], where: Where) -> dict[str, Path]:
    """llama.cpp's files in the classes of our `kinds`, and `gguf` as it is; none, and a sentence, where it cannot run.

    Args:
        model: ours as it was asked for; None: the default one, whose file is known.
    """
    source = gguf or (llama_cpp.default_gguf() if model is None else None)
    if not llama_cpp.is_available() or source is None or is_cuda(where.device):
        where.note("Without llama.cpp: it needs the `bench` extra, a CPU, and --gguf unless it is the default model.")
        return {}
    folder = Path(where.keep.enter_context(tempfile.TemporaryDirectory()))
    wanted = [llama_cpp.CLASSES[kind] for kind in kinds if kind in llama_cpp.CLASSES]
    return llama_cpp.files_of(source, folder, wanted, num_threads=where.num_threads)


def cache_bytes_per_token(config: ModelConfig) -> int:
    """Of keys and values of one token in all layers, in fp32."""
    return 8 * config.num_layers * config.num_kv_heads * config.head_size


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `TooLongError` inside once the time is over; in the main thread alone."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TooLongError(f"it was not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _in_words(error: BaseException) -> str:
    """The first line of an error, with its kind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
