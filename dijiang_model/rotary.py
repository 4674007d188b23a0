"""The frequencies of rotary position embeddings, scaled as the model was trained to have them.

A channel pair c turns by `frequencies[c]` radians for each position. The kinds of scaling are those of transformers
(`modeling_rope_utils`): `linear` divides all frequencies; `llama3` divides the slow ones, leaves the fast ones and goes
smoothly from one to the other; `yarn` does so by the number of turns over the original range.
"""

import math
from dataclasses import dataclass
from typing import Literal

ScalingKind = Literal["linear", "llama3", "yarn"]
Frequencies = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How frequencies differ from `theta ** (-2 c / dims)`.

    Attributes:
        factor: by which slow frequencies are divided.
        original_positions: tokens of the range before the scaling; `linear` does not ask.
        low, high: llama3: turns over the original range below which all is divided, and above which nothing is.
            yarn: the same under the names beta_slow and beta_fast.
        is_truncated: yarn: whether the channels between which it goes over are whole numbers.
        attention_factor: yarn: queries and keys are multiplied with it. Conversion folds it into their projections, so
            that nothing at run time knows of it.
    """

    kind: ScalingKind
    factor: float
    original_positions: int = 0
    low: float = 1.0
    high: float = 4.0
    is_truncated: bool = True
    attention_factor: float = 1.0

    def scaled(self, frequencies: Frequencies, *, theta: float) -> Frequencies:
        """The frequencies [dims / 2] that the model has, from those of `theta`."""
        match self.kind:
            case "linear":
                return tuple(frequency / self.factor for frequency in frequencies)
            case "llama3":
                return tuple(self._llama3(frequency) for frequency in frequencies)
            case "yarn":
                return self._yarn(frequencies, theta)

    def _llama3(self, frequency: float) -> float:
        turns = self.original_positions * frequency / (2 * math.pi)
        if turns < self.low:
            return frequency / self.factor
        if turns > self.high:
            return frequency
        share = (turns - self.low) / (self.high - self.low)
        return (1 - share) * frequency / self.factor + share * frequency

    def _yarn(self, frequencies: Frequencies, theta: float) -> Frequencies:
        dims = 2 * len(frequencies)

        def channel(turns: float) -> float:
            return dims * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first, last = channel(self.high), channel(self.low)
        if self.is_truncated:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dims - 1)
        span = last - first if last != first else 0.001
        shares = [min(max((index - first) / span, 0.0), 1.0) for index in range(len(frequencies))]
        return tuple(
            frequency / self.factor * share + frequency * (1 - share)
            for frequency, share in zip(frequencies, shares, strict=True)
        )


def rotary_frequencies(dims: int, *, theta: float, scaling: RopeScaling | None = None) -> Frequencies:
    """Radians for each position, [dims / 2]."""
    plain = tuple(theta ** (-2 * channel / dims) for channel in range(dims // 2))
    return plain if scaling is None else scaling.scaled(plain, theta=theta)


def yarn_attention_factor(factor: float, *, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """What yarn multiplies queries and keys with where a config does not say."""

    def grown(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return grown(mscale) / grown(mscale_all_dim) if mscale and mscale_all_dim else grown(1.0)
