"""What an evaluation can measure, as plain values."""

from dataclasses import dataclass
from typing import Literal

Rounding = Literal["int8", "int4", "bfloat16-state", "int8-state"]
LONG_EDGES = (1024, 2048, 8192, 32_768)
"""Ranges of positions: 1,024-2,048, 2,048-8,192 and 8,192-32,768. Fresh starts score the last range as the first."""
LONG_TOKENS = LONG_EDGES[-1]


@dataclass(frozen=True, slots=True)
class Measurements:
    """What to measure.

    Attributes:
        num_windows, length: windows of each text, and their tokens.
        num_facts: chats of 2,048 tokens in which facts are told and asked for; 0: none.
        ablations: whether parts of the model are switched off too.
        budgets: other bytes of a state, for a curve; only of a calibrated model.
        num_long: texts of `LONG_TOKENS` tokens to read; 0: none.
        rounded: in fewer bits, as the model is served.
    """

    num_windows: int
    length: int
    num_facts: int = 0
    num_long: int = 0
    rounded: tuple[Rounding, ...] = ()
    budgets: tuple[int, ...] = ()
    ablations: bool = True
