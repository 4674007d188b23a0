"""What is to be known of a family of models, in one value: everything else asks it and knows no family by name."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dijiang_model.config import ModelConfig
from dijiang_model.formats.json_fields import Fields
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.paths import Paths


@dataclass(frozen=True, slots=True)
class Family:
    """A family: its network, where its parts are, and how its configs are read and written.

    Attributes:
        name: HF's `model_type`, and `ModelConfig.family`.
        network: builds one, uninitialised.
        read_config: the network of an HF config; problems are reported to the fields, and raised.
        write_config: what an HF config says beside what all families' say.
        buffers: names of constants that HF checkpoints carry beside the weights; they are derived from the config here.
    """

    name: str
    network: Callable[..., DiJiangForCausalLM]
    paths: Paths
    read_config: Callable[[Fields], ModelConfig]
    write_config: Callable[[ModelConfig], Mapping[str, object]]
    buffers: re.Pattern[str]
