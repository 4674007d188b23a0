"""Quantized weights in the places of a network's projections and embeddings."""

from collections.abc import Iterator

from torch import Tensor, nn

from dijiang_model.quantization.weight import Int8Weight, QuantizedWeight


class QuantizedLinear(nn.Module):
    """Stands in for a `nn.Linear`; for inference only."""

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., columns] -> [..., rows]."""
        return self.weight.product(x, self.bias)


class QuantizedEmbedding(nn.Module):
    """Stands in for a `nn.Embedding`; its codes may be the output head's too."""

    def __init__(self, weight: Int8Weight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        """[...] int64 -> [..., columns]."""
        return self.weight.looked_up(ids)


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, QuantizedWeight]]:
    """All of them, by module path; one that two modules share comes once."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            yield path, module
