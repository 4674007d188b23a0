"""How a model's authors want it sampled where a request says nothing: `generation_config.json` beside its weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path

from dijiang_model.errors import ConfigError
from dijiang_model.formats.atomic_file import write_atomically
from dijiang_model.formats.json_fields import read_json_object

SAMPLING_FILE = "generation_config.json"
_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


@dataclass(frozen=True, slots=True)
class DefaultSampling:
    """Sampling of requests that do not say otherwise; the defaults here are neutral.

    Attributes:
        temperature: 0 to 2; 0 is greedy.
        top_p: 0 to 1.
        top_k: 0: any number of tokens.
        min_p: 0 to 1.
        repetition_penalty: 0.01 to 100.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, values: Mapping[str, object], *, source: str) -> "DefaultSampling":
        """Returns the sampling that a mapping names; other keys and nulls are left out.

        Raises:
            ConfigError: a value is no number, or out of its range; `source` says where it is.
        """
        named = {field.name: values[field.name] for field in fields(cls) if values.get(field.name) is not None}
        for name, value in named.items():
            if not _is_valid(name, value):
                low, high = _RANGES[name]
                raise ConfigError(f"{source} has {name} {value!r}, must be a number from {low:g} to {high:g}")
        return cls(**named)  # type: ignore[arg-type]  # numbers, as was just checked


def _is_valid(name: str, value: object) -> bool:
    low, high = _RANGES[name]
    kinds = (int,) if name == "top_k" else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and isfinite(value) and low <= value <= high


NEUTRAL = DefaultSampling()
"""Every token by its own likelihood."""


def read_default_sampling(folder: Path) -> DefaultSampling:
    """Returns what `generation_config.json` of a model's folder names; neutral where there is none.

    Raises:
        ConfigError: the file cannot be read, or names a value that is out of range.
    """
    file = folder / SAMPLING_FILE
    return DefaultSampling.of(read_json_object(file), source=str(file)) if file.is_file() else NEUTRAL


def write_default_sampling(sampling: DefaultSampling, folder: Path) -> None:
    """Writes it into a model's folder; neutral sampling needs no file."""
    if sampling != NEUTRAL:
        write_atomically(folder / SAMPLING_FILE, f"{json.dumps(asdict(sampling), indent=2)}\n".encode())
