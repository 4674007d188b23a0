"""Which part of a network a rank has, and into how many parts a network can be split.

Everything is split by whole key-value heads: a rank has the network of a smaller config (`local_config`), but for
the hidden size, which stays. So a tensor's part follows from the shapes of that network (`part_of`): the dimension
that is smaller there is cut into equal, contiguous pieces. GPT-NeoX's fused projection is interleaved by head
([H, 3, d]), hence a piece of it is whole heads too. Only the vocabulary may be cut unevenly.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from dijiang_model.config import AttentionConfig, ModelConfig
from dijiang_model.errors import ConfigError
from dijiang_model.quantization.config import Quantization


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of rank `rank` of `size`."""

    rank: int
    size: int

    def vocabulary(self, vocab_size: int) -> range:
        """The token ids whose rows of embedding and head this rank has; sizes differ by one at most."""
        return range(self.rank * vocab_size // self.size, (self.rank + 1) * vocab_size // self.size)


def working_degrees(config: ModelConfig, quantization: Quantization | None = None) -> tuple[int, ...]:
    """Into how many parts a network can be split, ascending; 1 is always among them."""
    return tuple(size for size in range(1, config.num_kv_heads + 1) if _divides(config, quantization, size))


def local_config(
    config: ModelConfig, size: int, quantization: Quantization | None = None, *, rank: int = 0
) -> ModelConfig:
    """The config of one of `size` parts; its vocabulary is still the whole one.

    Parts differ in the places of their heads alone, where layers have anchors.

    Raises:
        ConfigError: the network cannot be split so, with the degrees that work.
    """
    degrees = working_degrees(config, quantization)
    if size not in degrees:
        *others, largest = map(str, degrees)
        working = f"{', '.join(others)} or {largest}" if others else largest
        groups = ""
        if quantization is not None and quantization.group_size > 0:
            groups = f" in {quantization.weights} groups of {quantization.group_size}"
        raise ConfigError(
            f"a model with {config.num_heads} heads, {config.num_kv_heads} key-value heads and an MLP of "
            f"{config.intermediate_size:,}{groups} cannot be split over {size} ranks; it can over {working}"
        )
    num_kv_heads = config.num_kv_heads // size
    heads = range(rank * num_kv_heads, (rank + 1) * num_kv_heads)
    return replace(
        config,
        layers=tuple(_local_layer(layer, heads) for layer in config.layers),
        num_heads=config.num_heads // size,
        num_kv_heads=num_kv_heads,
        intermediate_size=config.intermediate_size // size,
    )


def _local_layer(layer: AttentionConfig, heads: range) -> AttentionConfig:
    return layer if layer.anchors is None else replace(layer, anchors=layer.anchors.of_heads(heads))


def part_of(tensor: Tensor, shape: tuple[int, ...], shard: Shard) -> Tensor:
    """A rank's part of a whole tensor, as a view.

    Args:
        tensor: of the whole network.
        shape: of the same tensor in the rank's network; differs in one dimension, or in none.
    """
    split = [axis for axis, (whole, part) in enumerate(zip(tensor.shape, shape, strict=True)) if whole != part]
    if not split:
        return tensor
    (axis,) = split
    rows = shard.vocabulary(tensor.shape[axis])  # where the pieces are equal this is the equal cut
    assert len(rows) == shape[axis]
    return tensor.narrow(axis, rows.start, len(rows))


def _divides(config: ModelConfig, quantization: Quantization | None, size: int) -> bool:
    if size == 1:
        return True
    has_group_norm = any(layer.read_out == "group_norm" for layer in config.layers)
    least_heads = 2 if has_group_norm else 1  # a group of the norm has a channel of each head
    return (
        config.num_kv_heads % size == 0
        and config.num_heads // size >= least_heads
        and config.intermediate_size % size == 0
        and config.vocab_size >= size
        and (quantization is None or _keeps_groups(config, quantization, size))
    )


def _keeps_groups(config: ModelConfig, quantization: Quantization, size: int) -> bool:
    """Whether no group of columns, and no byte with the codes of two rows, is on two ranks."""
    if quantization.group_size == 0:
        return True
    inner, heads = config.intermediate_size // size, config.num_heads * config.head_size // size
    keys = config.num_kv_heads * config.head_size // size
    return inner % quantization.group_size == 0 and heads % quantization.group_size == 0 and keys % 2 == 0
