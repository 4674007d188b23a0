"""Which weights of a model are rounded, and how; recorded in its `config.json`."""

from dataclasses import dataclass
from typing import Literal

WeightKind = Literal["int8", "int4"]
GROUP_SIZES = (32, 64)
DEFAULT_GROUP_SIZE = 32


@dataclass(frozen=True, slots=True)
class Quantization:
    """Of a model's projections; embeddings and head are int8 in any case.

    Attributes:
        weights: int8 with a scale for each output, or int4 with one for each group of inputs.
        group_size: neighbouring inputs under one scale, one of `GROUP_SIZES`; 0 for int8.
        has_minimums: int4 only: groups have a smallest value of their own instead of a fixed code for 0.
    """

    weights: WeightKind
    group_size: int = 0
    has_minimums: bool = False

    def problems(self) -> list[str]:
        """Contradictions in words; empty when there are none."""
        if self.weights == "int8":
            return [] if self.group_size == 0 and not self.has_minimums else ["int8 weights have no groups"]
        if self.group_size in GROUP_SIZES:
            return []
        return [f"group_size is {self.group_size}, must be one of {', '.join(map(str, GROUP_SIZES))}"]

    @property
    def bits_per_weight(self) -> float:
        """Of a projection, scales of groups included."""
        if self.weights == "int8":
            return 8.0
        return 4.0 + 16.0 * (1 + self.has_minimums) / self.group_size


INT8 = Quantization("int8")
EMBEDDINGS = INT8
"""Of token embeddings and of the output head."""
