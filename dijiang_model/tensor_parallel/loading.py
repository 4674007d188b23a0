"""Loading a rank's part of a checkpoint: of each tensor, only the slice that the rank computes with is read.

Files are mapped into memory, so a slice of rows that keeps its dtype on a CPU stays in the file, and the rest
of the tensor is never touched.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dijiang_model.checkpoints.checkpoint import fill_model, open_network
from dijiang_model.formats.tensor_files import TensorInfo, TensorSource
from dijiang_model.quantization.config import WeightKind
from dijiang_model.tensor_parallel.group import TensorGroup
from dijiang_model.tensor_parallel.network import ShardedModel, build_shard
from dijiang_model.tensor_parallel.shards import Shard, part_of


class TensorParts:
    """A rank's slices of a source's tensors; a `TensorSource`."""

    def __init__(self, source: TensorSource, shapes: Mapping[str, tuple[int, ...]], shard: Shard) -> None:
        """
        Args:
            source: of the whole tensors.
            shapes: of the slices.
            shard: whose they are.
        """
        self._source = source
        self._shard = shard
        self._infos = {
            name: TensorInfo(shapes[name], info.dtype) for name, info in source.infos().items() if name in shapes
        }

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str) -> Tensor:
        return part_of(self._source.read(name), self._infos[name].shape, self._shard)


def load_shard(
    path: str | Path,
    group: TensorGroup,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: WeightKind | None = None,
) -> ShardedModel:
    """Loads a rank's part of a model, ready to compute once the group is connected.

    Args:
        path: the model's folder, of either format; all ranks must see the same files.
        group: the ranks; not spoken to here.
        device: of all parameters of this rank.
        dtype: of the weights, or of those that are not rounded.
        weights: as for `checkpoints.load_model`; every rank then rounds all weights, and keeps its part of the codes.

    Raises:
        ConfigError: unsupported or contradictory values, or a network that cannot be split over so many ranks.
        CheckpointError, QuantizationError: as for `checkpoints.load_model`; values are checked by the rank that reads
            them.
    """
    path = Path(path)
    checkpoint, whole = open_network(path, dtype=dtype, weights=weights)
    model = build_shard(checkpoint.config, group, dtype=dtype, quantization=checkpoint.quantization)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    parts = TensorParts(checkpoint.tensors, shapes, Shard(group.rank, group.size))
    fill_model(model, parts, path, device=torch.device(device))
    model.prepare()
    return ShardedModel(model, whole.config, group)
