"""Everything that an evaluation measured, as plain values."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from dijiang_model.conversion.evaluation.evaluate import EDGES, Score
from dijiang_model.conversion.evaluation.long_texts import LongScore
from dijiang_model.conversion.evaluation.recall import Recall, far_recall
from dijiang_model.conversion.evaluation.wanted import LONG_EDGES

RANGES = (*(f"{low}-{high}" for low, high in pairwise(EDGES)), f"{EDGES[-1]}+")
SIZED = re.compile(r"ours(, [\d.]+ MiB)?")
"""Names of variants that are the model with states of several sizes."""
LONG_RANGES = tuple(f"{low:,}-{high:,}" for low, high in pairwise(LONG_EDGES))


@dataclass(frozen=True, slots=True)
class SizePoint:
    """Quality with a state of one size.

    Attributes:
        state_bytes: of a conversation.
        gap: nats per token behind the teacher from `FAR_FROM` on.
        facts: told 500 tokens back and more and answered rightly, over those that the teacher answers; None: no facts.
    """

    state_bytes: int
    gap: float
    facts: float | None


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
        recall, long_scores: empty where they were not asked for.
        first_turn: of facts told in the first turn alone.
        control: how the control was trained; None without one.
        num_long: texts behind `long_scores`.
        cache_bytes: that ordinary attention of this shape keeps of each token, in 16-bit numbers; 0: not known.
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
    first_turn: Sequence[Recall] = ()
    control: str | None = None
    long_scores: Mapping[str, LongScore] = field(default_factory=dict)
    num_long: int = 0
    cache_bytes: int = 0

    @property
    def by_size(self) -> list[SizePoint]:
        """From the smallest state to the largest; empty where the text is too short."""
        teacher, points = self.scores["teacher"].far if "teacher" in self.scores else None, []
        for name, score in self.scores.items():
            num_bytes = self.state_bytes[name]
            if SIZED.fullmatch(name) and num_bytes is not None and teacher is not None and score.far is not None:
                facts = far_recall(self.recall, name, "teacher") if self.recall else None
                points.append(SizePoint(num_bytes, score.far - teacher, facts))
        return sorted(points, key=lambda point: point.state_bytes)
