"""Our `config.json`: a `ModelConfig` together with where the model comes from.

    {"model_type": "dijiang", "format_version": 1,
     "base": the teacher's HF config, verbatim but for `auto_map`,
     "dijiang": {"layers": {"default": attention, "overrides": {"3": attention, ...}},
                 "position_table_length": ..., "bos_token_id": ..., "eos_token_ids": [...], "pad_token_id": ...,
                 "quantization": {"weights": "int4", "group_size": 32, "has_minimums": true} of rounded weights,
                 "origin": {"recipe": ..., "teacher": ..., "tokens_trained": ..., ...}}}

Unknown fields of our own section are errors, so that no setting of a newer version is ignored.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast, get_args

from dijiang_model.checkpoints.hf_config import base_model_config
from dijiang_model.config import (
    AnchorConfig,
    AttentionConfig,
    Basis,
    Decay,
    FeatureConfig,
    ModelConfig,
    Normalisation,
    ReadOut,
)
from dijiang_model.errors import ConfigError
from dijiang_model.families import FAMILIES
from dijiang_model.families.config_fields import eos_ids
from dijiang_model.features import NODE_NAMES
from dijiang_model.formats.json_fields import Fields, read_json_object
from dijiang_model.formats.model_folder import no_model_problem
from dijiang_model.quantization.config import Quantization, WeightKind

FORMAT_VERSION = 1
MODEL_TYPE = "dijiang"
CONFIG_FILE = "config.json"
CHECKPOINT_NODES = "checkpoint"
"""The node set's name where the nodes came with the weights."""

_ATTENTION_FIELDS = tuple(field.name for field in fields(AttentionConfig))
_ANCHOR_FIELDS = tuple(field.name for field in fields(AnchorConfig))
_FEATURE_FIELDS = tuple(field.name for field in fields(FeatureConfig))
_SECTION_FIELDS = (
    *("layers", "position_table_length", "bos_token_id", "eos_token_ids", "pad_token_id", "quantization", "origin"),
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a model comes from and what was trained.

    Attributes:
        recipe: `hybrid`, `pure`, `released`, or `checkpoint` for a re-saved DiJiang model.
        teacher: the source model's name.
        licence: the teacher's, as the source states it; None: not stated.
        dequantised_from: the source's quantized types, e.g. `Q4_1, Q8_0`; None: it was not quantized.
        tokens_trained: tokens seen by training after the swap; 0: a training-free conversion.
        seed: of the fresh tensors.
        converter_version: of the code that wrote the model (`conversion.convert.CONVERTER_VERSION`); 0: none.
        source_sha256: of a source that is one file; None otherwise.
        adapter_sha256: of the adapter file that was merged last; None: none was.
        teacher_fingerprint: of a source that is a folder (`conversion.teacher.source_fingerprint`); None otherwise.
    """

    recipe: str
    teacher: str
    licence: str | None = None
    dequantised_from: str | None = None
    tokens_trained: int = 0
    seed: int = 0
    converter_version: int = 0
    source_sha256: str | None = None
    adapter_sha256: str | None = None
    teacher_fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class StoredConfig:
    """Everything that our `config.json` says.

    Attributes:
        base: the HF config without `auto_map`.
        quantization: of the weights; None: they are not rounded.
    """

    config: ModelConfig
    base: Mapping[str, object]
    origin: Origin
    quantization: Quantization | None = None


def read_stored_config(path: Path) -> StoredConfig:
    """Reads `path`/config.json of our own format.

    Raises:
        ConfigError: not our format, or unsupported or contradictory values, all of them listed.
    """
    return parse_stored_config(read_config(path))


def read_config(path: Path) -> dict[str, object]:
    """Returns the `config.json` of a model folder of any format.

    Raises:
        ConfigError: there is none, it is damaged, or `path` is something else than the folder of a model.
    """
    problem = no_model_problem(path)
    if problem is not None:
        raise ConfigError(problem)
    return read_json_object(path / CONFIG_FILE)


def parse_stored_config(document: Mapping[str, object]) -> StoredConfig:
    """As `read_stored_config`, from the parsed JSON object."""
    if document.get("model_type") != MODEL_TYPE:
        raise ConfigError(
            f"model_type is {document.get('model_type')!r}, must be {MODEL_TYPE!r}; `dijiang convert` makes such models"
        )
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise ConfigError(f"format_version is {version!r}, this code reads {FORMAT_VERSION}")
    top = Fields(document)
    top.only(("model_type", "format_version", "architectures", "base", "dijiang"))
    base = document.get("base")
    if not isinstance(base, dict):
        raise ConfigError("config.json has no object named base")
    backbone = base_model_config(base)
    section = top.nested("dijiang")
    section.only(_SECTION_FIELDS)
    origin = _origin(section.nested("origin"))
    layers = _layers(section.nested("layers"), backbone.num_layers)
    table_length = section.integer("position_table_length", 0, minimum=0)
    token_ids = _token_ids(section, backbone)
    quantization = _quantization(section.nested("quantization")) if "quantization" in section else None
    for problem in layers_problems(layers, base=backbone, position_table_length=table_length):
        section.report(problem)
    top.raise_if_any("unsupported or contradictory values in config.json")
    config = replace(backbone, layers=layers, position_table_length=table_length, **token_ids)
    return StoredConfig(config=config, base=base, origin=origin, quantization=quantization)


def stored_config_text(stored: StoredConfig) -> str:
    """The text of `config.json`; `parse_stored_config` reads back an equal value.

    Raises:
        ConfigError: the configuration contradicts itself or its base.
    """
    config, quantization = stored.config, stored.quantization
    document: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "format_version": FORMAT_VERSION,
        "base": {name: value for name, value in stored.base.items() if name != "auto_map"},
        "dijiang": {
            "layers": _layers_document(config.layers),
            "position_table_length": config.position_table_length,
            "bos_token_id": config.bos_token_id,
            "eos_token_ids": list(config.eos_token_ids),
            "pad_token_id": config.pad_token_id,
            **({} if quantization is None else {"quantization": asdict(quantization)}),
            "origin": _origin_document(stored.origin),
        },
    }
    if parse_stored_config(document).config != config:
        raise ConfigError("the base config describes another network than the model's configuration")
    return json.dumps(document, indent=2) + "\n"


def base_document(config: ModelConfig) -> dict[str, object]:
    """An HF config that `base_model_config` reads as this backbone; for models made without a source."""
    document: dict[str, object] = {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    return {**document, **FAMILIES[config.family].write_config(config)}


def parse_layers(document: object, *, base: ModelConfig) -> tuple[AttentionConfig, ...]:
    """Layers from a list of `attention_document`, as an adapter stores them.

    Raises:
        ConfigError: unsupported or contradictory values, all of them listed.
    """
    listed = document if isinstance(document, list) else []
    section = Fields({str(index): layer for index, layer in enumerate(listed)})
    layers = tuple(_attention(section.nested(name)) for name in section.names())
    if len(layers) != base.num_layers:
        section.report(f"{len(layers)} layers, the base has {base.num_layers}")
    for problem in layers_problems(layers, base=base, position_table_length=base.position_table_length):
        section.report(problem)
    section.raise_if_any("unsupported or contradictory layers")
    return layers


def layers_problems(layers: tuple[AttentionConfig, ...], *, base: ModelConfig, position_table_length: int) -> list[str]:
    """What contradicts itself, or cannot be computed, in the layers; empty when all is well."""
    problems = [
        f"layer {index}: {text}"
        for index, layer in enumerate(layers)
        for text in [*layer.problems(), *_feature_problems(layer.features)]
    ]
    has_tables = any(layer.decay == "table" for layer in layers)
    if has_tables and not position_table_length:
        problems.append("layers with decay tables need a position_table_length above 0")
    if has_tables and base.num_kv_heads != base.num_heads:
        problems.append(f"decay tables need a key-value head per head, not {base.num_kv_heads} for {base.num_heads}")
    problems += [
        f"layer {index}: anchors of {len(layer.anchors.places)} heads, there are {base.num_kv_heads}"
        for index, layer in enumerate(layers)
        if layer.anchors is not None and len(layer.anchors.places) != base.num_kv_heads
    ]
    if position_table_length and not has_tables:
        problems.append(f"position_table_length is {position_table_length}, but no layer has decay tables")
    return problems


def _feature_problems(features: FeatureConfig) -> list[str]:
    problems = []
    if len(set(features.bases)) < len(features.bases):
        problems.append(f"bases {list(features.bases)} repeat themselves")
    if ("matrix" in features.bases) != (features.nodes == CHECKPOINT_NODES):
        problems.append(f"nodes {features.nodes!r} do not fit bases {list(features.bases)}")
    return problems


def attention_document(layer: AttentionConfig) -> dict[str, object]:
    """A layer as JSON has it; without `anchors` and `width` where it has none, as before there were any."""
    document = asdict(layer)
    if layer.anchors is None:
        del document["anchors"]
    if layer.features.width is None:
        del document["features"]["width"]
    return document


def _layers_document(layers: tuple[AttentionConfig, ...]) -> dict[str, object]:
    default = Counter(layers).most_common(1)[0][0]
    overrides = {str(index): attention_document(layer) for index, layer in enumerate(layers) if layer != default}
    return {"default": attention_document(default), "overrides": overrides}


def _layers(section: Fields, num_layers: int) -> tuple[AttentionConfig, ...]:
    section.only(("default", "overrides"))
    default = _attention(section.nested("default"))
    overrides = section.nested("overrides")
    known = {str(index): index for index in range(num_layers)}
    overrides.only(known)
    changed = {known[name]: _attention(overrides.nested(name)) for name in overrides.names() if name in known}
    return tuple(changed.get(index, default) for index in range(num_layers))


def _attention(section: Fields) -> AttentionConfig:
    section.only(_ATTENTION_FIELDS)
    return AttentionConfig(
        features=_features(section.nested("features")),
        read_out=cast(ReadOut, section.text("read_out", choices=get_args(ReadOut))),
        decay=cast(Decay, section.text("decay", choices=get_args(Decay))),
        window=section.integer("window", 0, minimum=0),
        sinks=section.integer("sinks", 0, minimum=0),
        anchors=_anchors(section.nested("anchors")) if "anchors" in section else None,
    )


def _anchors(section: Fields) -> AnchorConfig:
    section.only(_ANCHOR_FIELDS)
    return AnchorConfig(
        places=section.integers("places", minimum=1),
        windows=section.integers("windows", minimum=1),
        age=section.number("age", minimum=0.0),
        grid=section.number("grid"),
        span=section.integer("span", minimum=0),
        key_bits=section.integer("key_bits"),
        value_bits=section.integer("value_bits"),
    )


def _features(section: Fields) -> FeatureConfig:
    section.only(_FEATURE_FIELDS)
    bases = section.value("bases")
    known = get_args(Basis)
    # Equality, not hashing: a JSON value may be a list.
    if not isinstance(bases, list | tuple) or any(basis not in list(known) for basis in bases):
        section.report(f"features.bases is {bases!r}, must be a list of {', '.join(known)}")
        bases = ("dct2",)
    return FeatureConfig(
        bases=tuple(bases),
        normalisation=cast(Normalisation, section.text("normalisation", choices=get_args(Normalisation))),
        scale=section.number("scale"),
        nodes=section.text("nodes", choices=(*NODE_NAMES, CHECKPOINT_NODES)),
        far_rank=section.integer("far_rank", 0, minimum=0),
        rotated=section.boolean("rotated", True),
        width=section.integer("width", minimum=0) if "width" in section else None,
    )


def _quantization(section: Fields) -> Quantization:
    section.only([field.name for field in fields(Quantization)])
    quantization = Quantization(
        weights=cast(WeightKind, section.text("weights", choices=get_args(WeightKind))),
        group_size=section.integer("group_size", 0, minimum=0),
        has_minimums=section.boolean("has_minimums", False),
    )
    for problem in quantization.problems():
        section.report(f"quantization: {problem}")
    return quantization


def _origin_document(origin: Origin) -> dict[str, object]:
    document = asdict(origin)
    if origin.teacher_fingerprint is None:
        del document["teacher_fingerprint"]
    return document


def _origin(section: Fields) -> Origin:
    section.only([field.name for field in fields(Origin)])
    return Origin(
        recipe=section.text("recipe"),
        teacher=section.text("teacher"),
        licence=section.optional_text("licence"),
        dequantised_from=section.optional_text("dequantised_from"),
        tokens_trained=section.integer("tokens_trained", 0, minimum=0),
        seed=section.integer("seed", 0, minimum=0),
        converter_version=section.integer("converter_version", 0, minimum=0),
        source_sha256=section.optional_text("source_sha256"),
        adapter_sha256=section.optional_text("adapter_sha256"),
        teacher_fingerprint=section.optional_text("teacher_fingerprint"),
    )


def _token_ids(section: Fields, backbone: ModelConfig) -> dict[str, Any]:
    """The ids of our section, else those of the base config."""
    ids: dict[str, Any] = {}
    if "eos_token_ids" in section:
        ids["eos_token_ids"] = eos_ids(section.value("eos_token_ids"))
        if ids["eos_token_ids"] is None or any(item >= backbone.vocab_size for item in ids["eos_token_ids"]):
            section.report(f"dijiang.eos_token_ids must be ids below vocab_size {backbone.vocab_size}")
    for name in ("bos_token_id", "pad_token_id"):
        if name in section.names():
            ids[name] = section.integer(name, minimum=0) if name in section else None
            if (ids[name] or 0) >= backbone.vocab_size:
                section.report(f"dijiang.{name} must be an id below vocab_size {backbone.vocab_size}")
    return ids
