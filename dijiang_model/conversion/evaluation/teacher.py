"""The softmax model that a conversion was made from: what it is recognised by, and how it is loaded."""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from dijiang_model.checkpoints.checkpoint import load_model
from dijiang_model.checkpoints.config_json import CONFIG_FILE, MODEL_TYPE, Origin, StoredConfig, read_stored_config
from dijiang_model.config import ModelConfig
from dijiang_model.conversion.recipes import Recipe, converted_config
from dijiang_model.conversion.sources.find_source import find_source
from dijiang_model.conversion.sources.source import open_source, sha256_of, source_fingerprint
from dijiang_model.errors import ConversionError
from dijiang_model.families import build_model
from dijiang_model.formats.json_fields import read_json_object
from dijiang_model.model import DiJiangForCausalLM

_UNCOMPARED = {"position_table_length": 0, "bos_token_id": None, "eos_token_ids": (), "pad_token_id": None}


def load_teacher(path: Path, *, device: torch.device | str = "cpu") -> DiJiangForCausalLM:
    """The unconverted weights in our blocks: of an HF folder, a GGUF file, or an untrained conversion.

    Raises:
        ModelError: see `open_source` and `load_model`.
    """
    path = find_source(path)
    if _is_own(path):
        return load_model(path, device=device)
    source = open_source(path)
    if source.is_dijiang:
        raise ConversionError(f"{path} is a DiJiang checkpoint, not the softmax model that it was made from")
    config = converted_config(source.config, Recipe.PURE, window=0, sinks=0)
    model = build_model(config, dtype=torch.float32)
    tensors = {
        name: torch.zeros(wanted.shape, device=device)
        if ".linear." in name
        else source.tensors.read(name).to(device=device, dtype=wanted.dtype).contiguous()
        for name, wanted in model.state_dict().items()
    }
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.prepare()


def check_teacher(model: StoredConfig, path: Path) -> None:
    """Returns where `path` may be what the model was made from: an equal network with the recorded weights.

    Weights are compared as far as the conversion has recorded what it read.

    Raises:
        ConversionError: it is another model, or one that was trained after its own conversion.
        ModelError: it cannot be read.
    """
    path = find_source(path)
    if _is_own(path):
        stored = read_stored_config(path)
        if stored.origin.tokens_trained > 0:
            raise ConversionError(
                f"{path} was trained for {stored.origin.tokens_trained:,} tokens after its conversion; "
                "the teacher is what a model was made from, or an untrained conversion of it"
            )
        config, found, is_known = stored.config, _identity(stored.origin), any(_identity(stored.origin))
    else:
        source = open_source(path)
        sha256 = sha256_of(path) if path.is_file() else None
        config, found, is_known = source.config, (sha256, None if sha256 else source_fingerprint(source)), True
    if _backbone(config) != _backbone(model.config):
        raise ConversionError(
            f"{path} is another network than {model.origin.teacher}, of which the model was made: "
            + "; ".join(_differences(config, model.config))
        )
    recorded = _identity(model.origin)
    if any(recorded) and is_known and recorded != found:
        raise ConversionError(
            f"{path} has other weights than {model.origin.teacher}, of which the model was made; "
            "name what was converted"
        )


def _differences(config: ModelConfig, wanted: ModelConfig) -> list[str]:
    """What differs, in words."""
    found, expected = asdict(_backbone(config)), asdict(_backbone(wanted))
    sizes = [] if config.num_layers == wanted.num_layers else [f"{config.num_layers} layers, not {wanted.num_layers}"]
    names = [name for name in expected if name != "layers" and found[name] != expected[name]]
    return sizes + [f"{name} is {found[name]}, not {expected[name]}" for name in names]


def _is_own(path: Path) -> bool:
    return path.is_dir() and read_json_object(path / CONFIG_FILE).get("model_type") == MODEL_TYPE


def _identity(origin: Origin) -> tuple[str | None, str | None]:
    return origin.source_sha256, origin.teacher_fingerprint


def _backbone(config: ModelConfig) -> ModelConfig:
    layers = (type(config.layers[0])(),) * config.num_layers
    return replace(config, layers=layers, **_UNCOMPARED)  # type: ignore[arg-type]
