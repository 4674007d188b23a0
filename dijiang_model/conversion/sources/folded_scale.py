"""A rotary scaling's factor on queries and keys, folded into their projections."""

from collections.abc import Mapping

from torch import Tensor

from dijiang_model.config import ModelConfig
from dijiang_model.families import FAMILIES
from dijiang_model.formats.tensor_files import TensorInfo, TensorSource


class FoldedScale:
    """A source whose queries and keys come out multiplied; a `TensorSource`.

    All channels of their heads rotate (`families.config_fields` sees to that), so that it makes no difference whether
    cosines and sines are multiplied, as transformers does, or what they rotate.
    """

    def __init__(self, source: TensorSource, config: ModelConfig) -> None:
        scaling = config.rope_scaling
        self._source, self._factor = source, 1.0 if scaling is None else scaling.attention_factor
        family = FAMILIES[config.family]
        self._scaled = {
            f"{family.paths.layers}.{layer}.{path}.{kind}"
            for layer in range(config.num_layers)
            for path in family.paths.query_and_key_scales
            for kind in ("weight", "bias")
        }

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._source.infos()

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        return (tensor.double() * self._factor).to(tensor.dtype) if name in self._scaled else tensor


def with_folded_scale(source: TensorSource, config: ModelConfig) -> TensorSource:
    """The source itself where its config scales nothing."""
    scaling = config.rope_scaling
    return source if scaling is None or scaling.attention_factor == 1 else FoldedScale(source, config)
