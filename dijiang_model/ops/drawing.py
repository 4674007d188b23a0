"""How tokens are drawn from logits: what every way of doing it is told of a step's rows."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draws:
    """Of M rows, in the order in which each filter works on what the one before left; equals are kept together.

    Attributes:
        uniforms: [M] float64 in [0, 1), where in the cumulated weights a row's token is.
        temperatures: [M] float64, > 0.
        min_p: [M] float64, weights below it are left out, the largest being 1; 0: off. None: no row uses it.
        top_k: [M] int64 >= 1, so many largest logits stay; the vocabulary's size: off. None: no row uses it.
        max_top_k: the largest k in use, as far as the host knows.
        top_p: [M] float64, as few of the heaviest as reach this share of all stay; above 1: off. None: no row uses it.
        typical_p: [M] float64, as few of the most typical as reach this share stay; above 1: off. None: no row uses it.
    """

    uniforms: Tensor
    temperatures: Tensor
    min_p: Tensor | None = None
    top_k: Tensor | None = None
    max_top_k: int = 0
    top_p: Tensor | None = None
    typical_p: Tensor | None = None
