"""The authors' checkpoint format: GPT-NeoX plus `proj_matrix`, `D1`, `D2`, `W_G` and `group_norm` per layer.

The config is that of GPT-NeoX (with an `auto_map`, which is never followed), so the tensors' names tell
the format. The position tables are trained parameters: they are loaded, never recomputed. The decay past
their end, which the format does not store, is the initialisation's gamma of each head.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dijiang_model.checkpoints.config_json import CHECKPOINT_NODES
from dijiang_model.checkpoints.hf_config import base_model_config
from dijiang_model.config import AttentionConfig, FeatureConfig, ModelConfig
from dijiang_model.formats.tensor_files import TensorInfo, TensorSource
from dijiang_model.kernel import released_log_decay

_ATTENTION = re.compile(r"(gpt_neox\.layers\.\d+\.attention\.)(.+)")
_OUR_NAMES = {
    "proj_matrix": "linear.projection",
    "D1": "linear.read_table",
    "D2": "linear.write_table",
    "W_G": "gate.weight",
}
_LOG_DECAY = "linear.log_decay"


def is_released_format(names: Iterable[str]) -> bool:
    """Whether these are the tensors of a released checkpoint, judged by its projection matrices."""
    return any(name.endswith(".attention.proj_matrix") for name in names)


def released_model_config(document: Mapping[str, object]) -> ModelConfig:
    """The network of a released checkpoint, from its GPT-NeoX `config.json`.

    Raises:
        ConfigError: unsupported or contradictory values, all of them listed.
    """
    base = base_model_config(document)
    attention = AttentionConfig(
        features=FeatureConfig(bases=("matrix",), normalisation="softmax", scale=1.0, nodes=CHECKPOINT_NODES),
        read_out="group_norm",
        decay="table",
    )
    layers = (attention,) * base.num_layers
    return replace(base, layers=layers, position_table_length=base.max_position_embeddings)


class ReleasedTensors:
    """A released checkpoint under our tensor names and shapes; a `TensorSource`.

    `D1` and `D2` [1, H, N, 1] become [H, N], `W_G` is transposed to the layout of `nn.Linear`.
    """

    def __init__(self, source: TensorSource, config: ModelConfig) -> None:
        self._source = source
        self._num_heads = config.num_heads
        self._released_names: dict[str, str] = {}
        self._infos: dict[str, TensorInfo] = {}
        for released_name, info in source.infos().items():
            name = _our_name(released_name)
            self._released_names[name] = released_name
            self._infos[name] = TensorInfo(_our_shape(name, info.shape), info.dtype)
        for layer in range(config.num_layers):
            name = f"gpt_neox.layers.{layer}.attention.{_LOG_DECAY}"
            self._infos[name] = TensorInfo((self._num_heads,), torch.float64)

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str) -> Tensor:
        released_name = self._released_names.get(name)
        if released_name is None:
            return released_log_decay(self._num_heads)
        tensor = self._source.read(released_name)
        return tensor.T if name.endswith(".gate.weight") else tensor.reshape(self._infos[name].shape)


def _our_name(released_name: str) -> str:
    match = _ATTENTION.fullmatch(released_name)
    return match[1] + _OUR_NAMES.get(match[2], match[2]) if match else released_name


def _our_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name.endswith("_table") and len(shape) == 4 and (shape[0], shape[3]) == (1, 1):
        return shape[1:3]
    return shape[::-1] if name.endswith(".gate.weight") else shape
