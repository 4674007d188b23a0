"""Everything that an evaluation measured, as plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from dijiang_model.conversion.evaluation.evaluate import EDGES, Score
from dijiang_model.conversion.evaluation.long_texts import EDGES as LONG_EDGES
from dijiang_model.conversion.evaluation.long_texts import LongScore
from dijiang_model.conversion.evaluation.recall import Recall
from dijiang_model.conversion.evaluation.speed import Speed

RANGES = (*(f"{low}-{high}" for low, high in pairwise(EDGES)), f"{EDGES[-1]}+")
LONG_RANGES = tuple(f"{low:,}-{high:,}" for low, high in pairwise(LONG_EDGES))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that was measured.

    Attributes:
        model, teacher: names.
        title: what the model may be called.
        tokens_trained: 0 for a training-free conversion.
        training: the recipe in words.
        text: names of the held-out files.
        window_tokens, num_windows: of the text.
        scores: by variant, in the order of tables.
        state_bytes: by variant; None: grows with the text.
        gap_closed: share of the gap from `FAR_FROM` on; None where there is none.
        recall, long_scores, speed: empty where they were not asked for.
        control: how the control was trained; None without one.
        num_long: texts behind `long_scores`.
        decode_path: what ran our steps, `native` or `torch`.
    """

    model: str
    teacher: str
    title: str
    tokens_trained: int
    training: str
    text: Sequence[str]
    window_tokens: int
    num_windows: int
    scores: Mapping[str, Score]
    state_bytes: Mapping[str, int | None]
    gap_closed: float | None
    recall: Sequence[Recall] = ()
    control: str | None = None
    long_scores: Mapping[str, LongScore] = field(default_factory=dict)
    num_long: int = 0
    speed: Sequence[Speed] = ()
    decode_path: str = "torch"
