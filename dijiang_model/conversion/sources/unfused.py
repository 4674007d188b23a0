"""Fused projections of a checkpoint taken apart into those of our network."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from dijiang_model.config import ModelConfig
from dijiang_model.families import FAMILIES
from dijiang_model.formats.tensor_files import TensorInfo, TensorSource


class UnfusedTensors:
    """A source whose fused tensors come out as their parts; a `TensorSource`.

    One whose rows are not those of its parts stays whole, and shows up as surplus.
    """

    def __init__(self, source: TensorSource, config: ModelConfig) -> None:
        family, infos = FAMILIES[config.family], source.infos()
        self._source = source
        self._places: dict[str, tuple[str, int]] = {}
        self._infos: dict[str, TensorInfo] = {}
        parts = {
            f"{family.paths.layers}.{layer}.{fused.path}.{kind}": (
                [f"{family.paths.layers}.{layer}.{part}.{kind}" for part in fused.parts],
                fused.rows(config),
            )
            for layer in range(config.num_layers)
            for fused in family.fused
            for kind in ("weight", "bias")
        }
        for name, info in infos.items():
            names, rows = parts.get(name, ([], ()))
            if not info.shape or info.shape[0] != sum(rows):
                self._infos[name] = info
                continue
            for index, part in enumerate(names):
                self._places[part] = (name, sum(rows[:index]))
                self._infos[part] = replace(info, shape=(rows[index], *info.shape[1:]))

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str) -> Tensor:
        if name not in self._places:
            return self._source.read(name)
        fused, first = self._places[name]
        return self._source.read(fused).narrow(0, first, self._infos[name].shape[0])


def unfused(source: TensorSource, config: ModelConfig) -> TensorSource:
    """The source itself where its family fuses nothing."""
    return UnfusedTensors(source, config) if FAMILIES[config.family].fused else source
