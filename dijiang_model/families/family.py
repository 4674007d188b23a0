"""What is to be known of a family of models, in one value: everything else asks it and knows no family by name."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dijiang_model.config import ModelConfig
from dijiang_model.formats.json_fields import Fields
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.paths import Paths

Metadata = Callable[..., Any]
"""Values of a GGUF file by their keys, without the architecture's name; a second argument is the default."""


@dataclass(frozen=True, slots=True)
class Gguf:
    """How llama.cpp stores a family.

    Attributes:
        architecture: its name in the file, and of the keys of its metadata.
        pairs_neighbours: whether rows of q and k are stored in the order of a rotary embedding that pairs neighbouring
            channels; HF's pairs the halves of a head.
        norm_offset: what is added to the weights of norms before they are stored.
        config: what the HF config says besides what all families' say.
    """

    architecture: str
    pairs_neighbours: bool = False
    norm_offset: float = 0.0
    config: Callable[[Metadata], Mapping[str, object]] = lambda value: {}


@dataclass(frozen=True, slots=True)
class Fused:
    """A projection in HF's checkpoints that is several in our network, one below the other.

    Attributes:
        path: from a block, in the checkpoint.
        gguf: llama.cpp's name of it.
        parts: from a block, in the network.
        rows: of each part.
    """

    path: str
    gguf: str
    parts: tuple[str, ...]
    rows: Callable[[ModelConfig], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Family:
    """A family: its network, where its parts are, and how its configs are read and written.

    Attributes:
        name: HF's `model_type`, and `ModelConfig.family`.
        network: builds one, uninitialised.
        read_config: the network of an HF config; problems are reported to the fields, and raised.
        write_config: what an HF config says beside what all families' say.
        buffers: names of constants that HF checkpoints carry beside the weights; they are derived from the config here.
        sliding_window: what the config's field of that name means: nothing that is known; a window that the field
            `use_sliding_window` switches on, which is refused; or one that `read_config` reads, of all layers or of
            those that `layer_types` names.
        gguf: None: not read from GGUF files.
        fused: what conversion takes apart.
    """

    name: str
    network: Callable[..., DiJiangForCausalLM]
    paths: Paths
    read_config: Callable[[Fields], ModelConfig]
    write_config: Callable[[ModelConfig], Mapping[str, object]]
    buffers: re.Pattern[str]
    sliding_window: Literal["unknown", "switched", "read", "by layer"] = "unknown"
    gguf: Gguf | None = None
    fused: tuple[Fused, ...] = ()
