"""A checkpoint's tensors, rounded while they are read: one weight in memory at a time.

Loading a model rounded and saving a rounded model both go this way, so that they cannot differ in a bit.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dijiang_model.formats.tensor_files import TensorInfo, TensorSource
from dijiang_model.quantization.config import Quantization
from dijiang_model.quantization.rounding import (
    Int4Groups,
    fit_groups,
    group_codes,
    pack_pairs,
    round_rows,
    row_scales,
    squared_error,
)

SAMPLED_ROWS = 128
SAMPLED_WEIGHTS = 12
CLEARLY_BETTER = 0.5


class QuantizedTensors:
    """A source in which each weight to be rounded has given way to its codes, scales and minimums."""

    def __init__(self, source: TensorSource, chosen: Mapping[str, Quantization]) -> None:
        """Takes names of weights [rows, columns] and how each is rounded; see `modules.weights_to_quantize`."""
        self._source = source
        self._parts: dict[str, tuple[str, str]] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._chosen = chosen
        self._known_scales: dict[str, dict[str, Tensor]] = {}
        for name, info in source.infos().items():
            if name not in chosen or not info.dtype.is_floating_point or len(info.shape) != 2:
                self._infos[name] = info
                continue
            for part, part_info in _part_infos(info.shape, chosen[name]).items():
                self._parts[f"{name}.{part}"] = (name, part)
                self._infos[f"{name}.{part}"] = part_info

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is codes, scales or minimums of a weight."""
        return name in self._parts

    def read(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._source.read(name)
        weight_name, part = self._parts[name]
        if part != "codes":
            return self._scales(weight_name)[part]
        weight, quantization = self._source.read(weight_name), self._chosen[weight_name]
        if quantization.weights == "int8":
            return round_rows(weight).codes
        scales = self._scales(weight_name)
        groups = Int4Groups(scales["scales"], scales.get("minimums"))
        return pack_pairs(group_codes(weight, groups, group_size=quantization.group_size))

    def _scales(self, name: str) -> dict[str, Tensor]:
        """Scales and minimums of a weight; kept, for they are small and asked for with the codes again."""
        if name not in self._known_scales:
            weight, quantization = self._source.read(name), self._chosen[name]
            if quantization.weights == "int8":
                self._known_scales[name] = {"scales": row_scales(weight)}
            else:
                groups = fit_groups(weight, group_size=quantization.group_size, has_minimums=quantization.has_minimums)
                minimums = {} if groups.minimums is None else {"minimums": groups.minimums}
                self._known_scales[name] = {"scales": groups.scales} | minimums
        return self._known_scales[name]


class InMemory:
    """Tensors that are there already, as a source."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def minimums_pay(source: TensorSource, names: Iterable[str], *, group_size: int) -> bool:
    """Whether int4 groups with minimums lose clearly less than those without, for a quarter more memory or so.

    They do for weights that were rounded so before (a GGUF file of type Q4_1). For others they make hardly a
    difference. Looks at some rows of some of the weights.
    """
    names = sorted(names)
    sampled = names[:: max(1, len(names) // SAMPLED_WEIGHTS)]
    losses = {False: 0.0, True: 0.0}
    for name in sampled:
        rows = source.read(name)[:SAMPLED_ROWS].float()
        for has_minimums in losses:
            losses[has_minimums] += squared_error(rows, group_size=group_size, has_minimums=has_minimums)
    return losses[True] < CLEARLY_BETTER * losses[False]


def _part_infos(shape: tuple[int, ...], quantization: Quantization) -> dict[str, TensorInfo]:
    rows, columns = shape
    if quantization.weights == "int8":
        return {"codes": TensorInfo((rows, columns), torch.int8), "scales": TensorInfo((rows,), torch.float32)}
    groups = (rows, -(-columns // quantization.group_size))
    names = ("scales", "minimums") if quantization.has_minimums else ("scales",)
    codes = {"codes": TensorInfo((-(-rows // 2), columns), torch.uint8)}
    return codes | {name: TensorInfo(groups, torch.float16) for name in names}
