"""Likelihood far beyond the teacher's range: one text read from its beginning, in fixed memory, as a server reads it.

A text is not equally hard everywhere, so the far tokens are scored twice: where they stand, and again 1,024 to 2,048
tokens after a fresh start. What lies between the two is the position's doing, not the text's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from dijiang_model.batch import PackedBatch, Step
from dijiang_model.conversion.evaluation.ablations import silenced
from dijiang_model.conversion.evaluation.evaluate import equal_window
from dijiang_model.conversion.evaluation.wanted import LONG_EDGES
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.serving.network import freeze
from dijiang_model.state import StateBuffer

CHUNK_TOKENS = 256
SLOT = 1


@dataclass(frozen=True, slots=True)
class LongScore:
    """Mean negative log-likelihoods of one model, nats per token, over all texts.

    Attributes:
        means: by range of `LONG_EDGES`.
        fresh: of the last range's tokens, read again with a fresh start; None where that was not measured.
    """

    means: list[float]
    fresh: float | None


def streams(model: DiJiangForCausalLM, teacher: DiJiangForCausalLM) -> dict[str, DiJiangForCausalLM]:
    """What is compared: ours, ours with the linear part off, the training-free window of equal bytes.

    Attention of one kind in all layers, each runs as served.
    """
    found = {"ours": model}
    if all(layer.window > 0 for layer in model.config.layers):
        found["ours, linear part off"] = silenced(model)
    sinks = max(layer.sinks for layer in model.config.layers) or 4
    window = equal_window(model, sinks=sinks)
    found[f"window {window}+{sinks}, no training"] = silenced(teacher, window=window, sinks=sinks)
    return found


def long_score(
    model: DiJiangForCausalLM,
    texts: Sequence[Tensor],
    *,
    with_fresh: bool,
    edges: Sequence[int] = LONG_EDGES,
    on_tokens: Callable[[int], None] = lambda num: None,
) -> LongScore:
    """Scores texts of at least `edges[-1]` tokens, [T] int64 each.

    Args:
        with_fresh: also read the tokens of the last range from fresh starts; see `tokens_to_read`.
        on_tokens: called with the tokens of each chunk.
    """
    ranges: dict[tuple[int, int], list[Tensor]] = {edge: [] for edge in pairwise(edges)}
    fresh: list[Tensor] = []
    for text in texts:
        text = text[: edges[-1]]
        losses = stream_losses(model, text, first=edges[0], on_tokens=on_tokens)
        for (low, high), parts in ranges.items():
            parts.append(losses[low - edges[0] : high - edges[0]])
        segments = _fresh_segments(text, edges) if with_fresh else []
        fresh += [stream_losses(model, segment, first=edges[0], on_tokens=on_tokens) for segment in segments]
    means = [float(torch.cat(parts).mean()) for parts in ranges.values()]
    return LongScore(means, float(torch.cat(fresh).mean()) if fresh else None)


def tokens_to_read(num_texts: int, *, with_fresh: bool, edges: Sequence[int] = LONG_EDGES) -> int:
    """What one model reads in `long_score`: with fresh starts about two and a half times as much."""
    segments = _fresh_segments(torch.zeros(edges[-1]), edges) if with_fresh else []
    return num_texts * (edges[-1] + sum(map(len, segments)))


def _fresh_segments(text: Tensor, edges: Sequence[int]) -> list[Tensor]:
    """Pieces of `edges[1]` tokens whose rests from `edges[0]` on are the last range, without a gap."""
    width = edges[1] - edges[0]
    return [text[start - edges[0] : min(start + width, edges[-1])] for start in range(edges[-2], edges[-1], width)]


@torch.inference_mode()
def stream_losses(
    model: DiJiangForCausalLM, text: Tensor, *, first: int = 1, on_tokens: Callable[[int], None] = lambda num: None
) -> Tensor:
    """Negative log-likelihoods of the tokens from `first` (>= 1) to the end, fp64 on the CPU, read chunk by chunk."""
    assert first >= 1
    served = freeze(model)
    state = StateBuffer(model.state_spec, SLOT + 1, model.device)
    state.storage.zero_()
    ids = text.to(model.device)
    losses = []
    for start in range(0, len(ids), CHUNK_TOKENS):
        chunk = ids[start : start + CHUNK_TOKENS]
        targets = ids[max(start + 1, first) : start + 1 + len(chunk)]
        logits = _step(served, chunk, start, max(first - 1 - start, 0), state)
        losses.append(functional.cross_entropy(logits[: len(targets)], targets, reduction="none").double().cpu())
        on_tokens(len(chunk))
    return torch.cat(losses)


def _step(model: Step, chunk: Tensor, start: int, first_row: int, state: StateBuffer) -> Tensor:
    """Reads a chunk; next-token logits of its rows from `first_row` on."""
    rows = torch.arange(min(first_row, len(chunk)), len(chunk), device=chunk.device)
    positions = torch.arange(start, start + len(chunk), device=chunk.device)
    slots = torch.tensor([SLOT], device=chunk.device)
    return model(PackedBatch(chunk, positions, slots, (len(chunk),), 0, rows), state)
