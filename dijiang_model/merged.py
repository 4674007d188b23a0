"""Projections of one input as one product, where a device waits for launches: their weights lie one below the other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dijiang_model.quantization.config import Quantization
from dijiang_model.quantization.modules import QuantizedLinear
from dijiang_model.quantization.weight import QuantizedWeight, quantized_weight


@dataclass(frozen=True, slots=True)
class Together:
    """The joint product of several projections; the first one carries it as its attribute `together`.

    Attributes:
        weight: [sum of sizes, columns]; those of the projections are views of it.
        bias: [sum of sizes], or None.
        sizes: rows of each.
    """

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    sizes: tuple[int, ...]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, columns] -> [T, size] of each projection, views of one product."""
        if isinstance(self.weight, QuantizedWeight):
            product = self.weight.product(x, self.bias)
        else:
            product = functional.linear(x, self.weight, self.bias)
        parts: tuple[Tensor, ...] = product.split(self.sizes, dim=-1)
        return parts


def products(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """[T, columns] -> [T, rows] of each projection: one product if they were merged, else theirs."""
    together = getattr(linears[0], "together", None)
    if isinstance(together, Together):
        return together(x)
    return tuple(linear(x) for linear in linears)


@torch.no_grad()
def merge(linears: Sequence[nn.Module], quantization: Quantization | None) -> bool:
    """Lets `products` of these projections be one; their weights become views of the joint one, under their own names.

    Args:
        quantization: of their weights; None: they are not quantized.

    Returns:
        Whether they are merged now: weights of one kind, and biases of all or of none.
    """
    if hasattr(linears[0], "together"):
        return True
    if len({linear.bias is None for linear in linears}) > 1:
        return False
    sizes: tuple[int, ...]
    weight: Tensor | QuantizedWeight
    if quantization is None and all(type(linear) is nn.Linear for linear in linears):
        sizes = tuple(linear.weight.shape[0] for linear in linears if isinstance(linear.weight, Tensor))
        weight = _joined(linears, "weight", sizes)
    elif quantization is not None and all(isinstance(linear, QuantizedLinear) for linear in linears):
        own = [linear.weight for linear in linears if isinstance(linear, QuantizedLinear)]
        sizes = tuple(one.rows for one in own)
        if quantization.weights == "int4" and any(size % 2 == 1 for size in sizes):
            return False  # a byte would have rows of two of them
        with torch.device("meta"):
            weight = quantized_weight(sum(sizes), own[0].columns, quantization, dtype=own[0].dtype)
        for name, _ in weight.named_buffers():
            setattr(weight, name, _joined(own, name, tuple(len(one.get_buffer(name)) for one in own)))
        weight.prepare()
    else:
        return False
    bias = None if linears[0].bias is None else _joined(linears, "bias", sizes)
    linears[0].together = Together(weight, bias, sizes)  # type: ignore[assignment]  # no module: not in a state dict
    return True


def _joined(owners: Sequence[nn.Module], name: str, sizes: tuple[int, ...]) -> Tensor:
    """The owners' tensors one below the other; each gets its part as a view."""
    joint = torch.cat([getattr(owner, name).detach() for owner in owners])
    for owner, part in zip(owners, joint.split(sizes), strict=True):
        is_parameter = name in owner._parameters
        setattr(owner, name, nn.Parameter(part, requires_grad=False) if is_parameter else part)
    return joint
