"""The residual stream between a network's sublayers."""

from dataclasses import dataclass

from torch import Tensor, nn

from dijiang_model.ops.selection import residual_norm


@dataclass(frozen=True, slots=True)
class Residual:
    """What sublayers read and add to; the last addition is put off until it can be made in one pass with a norm.

    Attributes:
        total: [T, width].
        delta: [T, width] to be added; None: nothing.
    """

    total: Tensor
    delta: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The stream itself, [T, width]."""
        return self.total if self.delta is None else self.total + self.delta

    def plus(self, delta: Tensor) -> "Residual":
        """The stream with a sublayer's output [T, width]."""
        return Residual(self.value, delta)

    def normed(self, norm: nn.Module) -> "tuple[Residual, Tensor]":
        """The same stream and its norm, [T, width].

        Args:
            norm: an `nn.LayerNorm` or a family's RMSNorm.
        """
        if self.delta is None:
            return self, norm(self.total)
        total, normed = residual_norm(self.total, self.delta, norm)
        return Residual(total), normed
