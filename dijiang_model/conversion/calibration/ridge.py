"""Ridge regression in closed form, from sums over many contexts."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

PENALTY = 0.01
"""Of the squared weights of standardised inputs, a share of the number of tokens."""


@dataclass(frozen=True, slots=True)
class RidgeSums:
    """Sums over tokens of inputs x [N, D] and targets y [N, O], in fp64.

    Attributes:
        count: tokens.
        x, y: [D] and [O], sums.
        xx, xy: [D, D] and [D, O], sums of products.
        yy: [O], sums of squares.
    """

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "RidgeSums":
        wide, y = x.double(), y.double()
        return cls(len(x), wide.sum(0), y.sum(0), (x.T @ x).double(), wide.T @ y, y.square().sum(0))

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weights [O, D] and biases [O] of y = W x + b, fp64."""
        mean_x, mean_y = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - torch.outer(mean_x, mean_x)
        variance = covariance.diagonal().clamp(min=1e-12)
        penalised = covariance + torch.diag(PENALTY * variance)
        weights = torch.linalg.solve(penalised, self.xy / self.count - torch.outer(mean_x, mean_y)).T
        return weights, mean_y - weights @ mean_x

    def correlation(self, weights: Tensor, bias: Tensor) -> Tensor:
        """[O] correlation of W x + b with y over these tokens."""
        mean_x, mean_y = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - torch.outer(mean_x, mean_x)
        shared = ((self.xy / self.count - torch.outer(mean_x, mean_y)) * weights.T).sum(0)
        spread = ((weights @ covariance) * weights).sum(1) * (self.yy / self.count - mean_y.square())
        return shared / spread.clamp(min=1e-12).sqrt()


def total(parts: Sequence[RidgeSums]) -> RidgeSums:
    """The sums over all the tokens of at least one part."""
    return RidgeSums(*(sum(getattr(part, field.name) for part in parts) for field in fields(RidgeSums)))
