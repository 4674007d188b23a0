"""The modules that differ in a split network; all others are those of a smaller one.

Each has the names of the module that it stands in for, so that a checkpoint fits.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from dijiang_model.config import ModelConfig
from dijiang_model.families.gpt_neox import GPTNeoXBlock
from dijiang_model.families.parts import RMSNorm
from dijiang_model.kernel import LinearKernel, wide_product
from dijiang_model.ops import AttentionOp, LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.ops.residual import Residual
from dijiang_model.ops.selection import two_norms
from dijiang_model.quantization.modules import QuantizedEmbedding, QuantizedLinear
from dijiang_model.quantization.weight import Int8Weight, QuantizedWeight
from dijiang_model.tensor_parallel.group import TensorGroup
from dijiang_model.tensor_parallel.shards import Shard


class RowParallelLinear(nn.Module):
    """A projection whose inputs are split: each rank multiplies its own, and the products are added up.

    Parameters: weight [out, in / size], perhaps quantized, and bias [out] (whole, on every rank, added once).
    """

    def __init__(self, linear: nn.Linear | QuantizedLinear, group: TensorGroup) -> None:
        """Takes the parameters over from the smaller network's projection."""
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in / size], this rank's -> [T, out], the same on every rank."""
        return self.finish(self._group.all_reduce_(self.product(x)))

    def product(self, x: Tensor) -> Tensor:
        """This rank's term of the sum, [T, out]."""
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.product(x)
        return functional.linear(x, self.weight)

    def finish(self, total: Tensor) -> Tensor:
        """Adds the bias to the sum."""
        return total if self.bias is None else total + self.bias


class PartialLinear(RowParallelLinear):
    """One whose term is added up later, together with others."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class ParallelResidualBlock(GPTNeoXBlock):
    """Attention and MLP that both read the layer's input: one sum over the ranks for the two of them."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype, group: TensorGroup) -> None:
        """As `GPTNeoXBlock`, of the rank's own config."""
        super().__init__(config, layer, dtype=dtype)
        self._group = group

    def forward(self, x: Residual, *, op: AttentionOp, layout: StepLayout, state: LayerState) -> Residual:
        x = Residual(x.value)
        normed, mlp_input = two_norms(x.total, self.input_layernorm, self.post_attention_layernorm)
        attended = self.attention(normed, op=op, layout=layout, state=state)
        total = self._group.all_reduce_(attended + self.mlp(mlp_input))
        for path in ("attention.dense", "mlp.dense_4h_to_h"):
            projection = self.get_submodule(path)
            assert isinstance(projection, PartialLinear)
            total = projection.finish(total)
        return x.plus(total)


class VocabParallelEmbedding(nn.Module):
    """A token embedding whose rows are split; the sum over the ranks is exact, for all but one of them add zeros.

    Parameters: weight [this rank's tokens, width], perhaps quantized.
    """

    def __init__(self, table: nn.Embedding | QuantizedEmbedding, num_tokens: int, group: TensorGroup) -> None:
        """Takes the rows over from a table of this rank's tokens alone; `num_tokens` is the whole vocabulary's size."""
        super().__init__()
        self.weight = table.weight
        self._rows = Shard(group.rank, group.size).vocabulary(num_tokens)
        self._group = group

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, width]."""
        row = token_ids - self._rows.start
        is_elsewhere = (row < 0) | (row >= len(self._rows))
        row = row.clamp(0, len(self._rows) - 1)
        weight = self.weight
        x = weight.looked_up(row) if isinstance(weight, Int8Weight) else functional.embedding(row, weight)
        return self._group.all_reduce_(x.masked_fill_(is_elsewhere[:, None], 0))


def group_norm(config: ModelConfig, *, dtype: torch.dtype, group: TensorGroup) -> nn.Module:
    """The released GroupNorm over all heads, d groups of H channels each, of a rank's part of the channels.

    Args:
        config: of the whole network.
        dtype: of the weights.
        group: the ranks.
    """
    width = config.num_heads * config.head_size // group.size
    if config.head_size % group.size == 0:
        return nn.GroupNorm(config.head_size // group.size, width, dtype=dtype)
    return StraddlingGroupNorm(config.head_size, width, dtype=dtype, group=group)


class StraddlingGroupNorm(nn.Module):
    """A GroupNorm whose groups do not end where a rank's channels do: every rank norms the channels of all."""

    def __init__(self, num_groups: int, width: int, *, dtype: torch.dtype, group: TensorGroup) -> None:
        """
        Args:
            num_groups: over all channels.
            width: channels of a rank.
            dtype: of the weights.
            group: the ranks.
        """
        super().__init__()
        self._group = group
        self._num_groups = num_groups
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, width], this rank's channels -> the same, normed."""
        width = len(self.weight)
        normed = functional.group_norm(self._group.all_gather(x), self._num_groups)
        return torch.addcmul(self.bias, normed.narrow(1, self._group.rank * width, width), self.weight)


class ParallelAllHeadsNorm(nn.Module):
    """The RMSNorm over all heads together, of which a rank has some: the ranks add up the squares.

    Parameters: weight [this rank's heads * d].
    """

    def __init__(self, norm: RMSNorm, group: TensorGroup) -> None:
        """Takes the weight over from the norm of a smaller network."""
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        """x [T, heads, d], this rank's -> the same, normed."""
        wide = x.flatten(1) if x.dtype == torch.float64 else x.flatten(1).float()
        squares = self._group.all_reduce_(wide.square().sum(-1, keepdim=True))
        root = (squares / (wide.shape[1] * self._group.size) + self.eps).rsqrt()
        return (wide * root * self.weight.to(wide.dtype)).to(x.dtype).view(x.shape)


class ParallelKernel(LinearKernel):
    """The kernel of a rank's heads; `far_query` goes through a low rank that all heads share."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, *, group: TensorGroup) -> None:
        """As `LinearKernel`, of the rank's own config."""
        super().__init__(config, layer, dtype)
        self._group = group

    def far_query_low(self, q: Tensor, product: Callable[[Tensor, Tensor], Tensor] = wide_product) -> Tensor:
        return self._group.all_reduce_(super().far_query_low(q, product))
