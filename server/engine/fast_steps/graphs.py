"""Decode steps captured once and replayed: one graph for each number of rows, filled up with rows on the scratch slot.

A captured step reads and writes the same memory whenever it is replayed: its inputs (`DecodeGraphs.feed`), the last
token of every slot, the states, its logits and its tokens. What is captured where is `Capture`'s business: CUDA
graphs on a GPU; on a CPU `eager` simply runs the work again, so that everything around the graphs is tested there.
Needs torch and the model alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dijiang_model.batch import PackedBatch
from dijiang_model.state import StateBuffer

MAX_ROWS = 512
"""Larger steps are launched freshly: there the device has far more to do than the host."""
Work = Callable[[], object]
Capture = Callable[[Work], Work]
"""Takes work on fixed memory, and answers how to do it again."""
Model = Callable[[PackedBatch, StateBuffer], Tensor]


def eager(work: Work) -> Work:
    """No recording: the work itself."""
    return work


class CudaCapture:
    """Records CUDA graphs that share one memory pool, on the current device."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, work: Work) -> Work:
        """Does the work once to compile its kernels and choose its algorithms, then records it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Threads that copy states may go on meanwhile: only this one is kept from what cannot be captured.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Numbers of rows that get a graph, ascending, up to `max_rows` (>= 1) and `MAX_ROWS`.

    Powers of two and what lies half way: up to a third of a step's rows is padding, which moves no states.
    """
    most = min(max_rows, MAX_ROWS)
    powers = [1 << exponent for exponent in range(MAX_ROWS.bit_length())]
    sizes = [*powers, *(3 * power // 2 for power in powers[3:])]
    return tuple(sorted({min(size, most) for size in sizes}))


@dataclass(frozen=True, slots=True)
class Captured:
    """One number of rows.

    Attributes:
        words: [F, rows] int64, the inputs; the first two rows are slots and positions.
        replay: runs the model.
    """

    words: Tensor
    replay: Work


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a replayed step samples.

    Attributes:
        tokens: [rows] int32, negative for faults, of the last replay.
        replay: samples the logits of the captured model, and notes the slots' last tokens.
    """

    tokens: Tensor
    replay: Work


class DecodeGraphs:
    """Captured decode steps of a model on one pool of slots.

    Attributes:
        buckets: the captured numbers of rows, ascending.
    """

    NUM_WORDS = 7
    """Words of a row: slot, position, and up to five of its sampling."""

    def __init__(
        self,
        model: Model,
        *,
        buffer: StateBuffer,
        last_token_ids: Tensor,
        buckets: Sequence[int],
        capture: Capture,
    ) -> None:
        """Records the model for every bucket, the largest first, so that the others fit into its memory.

        Args:
            last_token_ids: [P] int64, each slot's last token; read by steps, written by their sampling.
            buckets: ascending numbers of rows.
        """
        self._last_token_ids, self._capture = last_token_ids, capture
        self.device, self.buckets = last_token_ids.device, tuple(buckets)
        self._logits: Tensor | None = None  # [largest bucket, vocab], of the last replay, whichever it was
        self._captured = {rows: self._record(model, buffer, rows) for rows in reversed(self.buckets)}
        self._samplings: dict[tuple[int, str], Sampling] = {}

    def bucket_for(self, num_rows: int) -> int | None:
        """The smallest captured number of rows that is large enough; None if there is none."""
        return next((bucket for bucket in self.buckets if bucket >= num_rows), None)

    def record_sampling(self, kind: str, choose: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Records a way of sampling for every bucket.

        Args:
            kind: its name.
            choose: logits [R, vocab], which it may overwrite, and words [F, R] -> [R] int64, negative for faults.
        """
        for rows in reversed(self.buckets):
            self._samplings[rows, kind] = self._capture_sampling(self._captured[rows].words, choose)

    def samples(self, kind: str | None) -> bool:
        """Whether this way of sampling was captured."""
        return kind is not None and (self.buckets[0], kind) in self._samplings

    def feed(self, bucket: int, words: Tensor) -> None:
        """Puts a step's words [n * bucket] int64 in place, field after field; they were brought by one copy."""
        self._captured[bucket].words.view(-1)[: len(words)].copy_(words)

    def forward(self, bucket: int) -> Tensor:
        """Replays the model; its logits [bucket, vocab], which the next replay overwrites."""
        self._captured[bucket].replay()
        return self._logits_of(bucket)

    def sample(self, bucket: int, kind: str) -> Tensor:
        """Replays sampling; tokens [bucket] int32, which the next replay overwrites."""
        sampling = self._samplings[bucket, kind]
        sampling.replay()
        return sampling.tokens

    def _record(self, model: Model, buffer: StateBuffer, rows: int) -> Captured:
        words = torch.zeros((self.NUM_WORDS, rows), dtype=torch.int64, device=self.device)
        slots, positions = words[0], words[1]
        logit_rows = torch.arange(rows, device=self.device)

        def run() -> Tensor:
            token_ids = self._last_token_ids[slots]
            return model(PackedBatch(token_ids, positions, slots, (1,) * rows, rows, logit_rows), buffer)

        with torch.inference_mode():
            if self._logits is None:
                self._logits = torch.empty_like(run())
            logits = self._logits_of(rows)
            return Captured(words, self._capture(lambda: logits.copy_(run())))

    def _logits_of(self, bucket: int) -> Tensor:
        assert self._logits is not None
        return self._logits[:bucket]

    def _capture_sampling(self, words: Tensor, choose: Callable[[Tensor, Tensor], Tensor]) -> Sampling:
        tokens = torch.zeros(words.shape[1], dtype=torch.int32, device=words.device)
        logits = self._logits_of(words.shape[1])

        def work() -> None:
            token_ids = choose(logits, words)
            self._last_token_ids[words[0]] = token_ids.clamp(min=0)
            tokens.copy_(token_ids)

        with torch.inference_mode():
            return Sampling(tokens, self._capture(work))
