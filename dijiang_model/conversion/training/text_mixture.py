"""Several texts in fixed proportions, as one sequence of batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer as HfTokenizer
from torch import Tensor

from dijiang_model.conversion.training.chat_prompt import RenderChat, plain_chat
from dijiang_model.conversion.training.text_windows import TokenWindows, load_windows
from dijiang_model.errors import ConversionError

GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class TextSource:
    """A file or folder and its weight; None: as many windows as it has."""

    path: Path
    weight: float | None


@dataclass(frozen=True, slots=True)
class Mixture:
    """Texts that take turns by weight, each in its own order, epoch after epoch.

    Attributes:
        texts: windows of equal length.
        edges: cumulative shares of the texts, ending with 1.
    """

    texts: tuple[TokenWindows, ...]
    edges: npt.NDArray[np.float64]

    def batch(self, step: int, size: int) -> Tensor:
        """The windows of a step, [size, length] int64; a golden-ratio sequence picks the texts evenly."""
        return torch.cat([self._window(index) for index in range(step * size, (step + 1) * size)])

    def _window(self, index: int) -> Tensor:
        # Every pick before this one of the same text moves that text's own order on.
        first = max(0, index - 100_000)
        turns = np.arange(first, index + 1, dtype=np.float64)
        picks = np.searchsorted(self.edges, np.remainder(turns * GOLDEN_RATIO, 1.0), side="right")
        text = int(picks[-1])
        place = int((picks[:-1] == text).sum()) + int(first * self._share(text))
        return self.texts[text].batch(place, 1)

    def _share(self, text: int) -> float:
        return float(self.edges[text] - (self.edges[text - 1] if text > 0 else 0.0))


def parse_source(text: str) -> TextSource:
    """`PATH` or `PATH=WEIGHT`.

    Raises:
        ConversionError: a weight that is no number above 0.
    """
    path, separator, weight = text.rpartition("=")
    if not separator or Path(text).exists():
        return TextSource(Path(text), None)
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConversionError(f"{text}: the weight {weight!r} is no number above 0")
    return TextSource(Path(path), value)


def load_mixture(
    sources: Sequence[TextSource],
    tokenizer: HfTokenizer,
    *,
    length: int,
    seed: int,
    vocab_size: int,
    render: RenderChat = plain_chat,
) -> Mixture:
    """Tokenises all sources; see `load_windows`, also for what it raises."""
    texts = tuple(
        load_windows([source.path], tokenizer, length=length, seed=seed, vocab_size=vocab_size, render=render)
        for source in sources
    )
    if not texts:
        raise ConversionError("no text is given")
    pairs = zip(texts, sources, strict=True)
    weights = np.array([len(text) if source.weight is None else source.weight for text, source in pairs], dtype=float)
    edges = np.cumsum(weights / weights.sum())
    edges[-1] = 1.0
    return Mixture(texts, edges)
