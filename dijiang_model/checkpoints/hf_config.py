"""The backbone of a Hugging Face `config.json` as a `ModelConfig`, of the families in `dijiang_model.families`.

What no family here computes (sliding windows, quantized weights, experts, ...) is a ConfigError that lists all of it.
"""

from collections.abc import Mapping

from dijiang_model.config import ModelConfig
from dijiang_model.errors import ConfigError
from dijiang_model.families import FAMILIES
from dijiang_model.families.family import Family
from dijiang_model.formats.json_fields import Fields

_WINDOW_SWITCH = "use_sliding_window"
_REFUSED = {
    "sliding_window": "a sliding window is not supported",
    "quantization_config": "quantized weights are not supported; take the model they were made of, or a GGUF file",
    "num_local_experts": "a mixture of experts is not supported",
    "num_experts": "a mixture of experts is not supported",
}


def base_model_config(document: Mapping[str, object]) -> ModelConfig:
    """The network that an HF config describes; its layers have a default `AttentionConfig` each.

    `auto_map` is never followed.

    Raises:
        ConfigError: unsupported or contradictory values, all of them listed.
    """
    if document.get("model_type") is None:
        raise ConfigError("config.json names no model_type, so it is not the config of a language model")
    family = FAMILIES.get(str(document.get("model_type")))
    if family is None:
        *others, last = FAMILIES
        is_multimodal = isinstance(document.get("text_config"), dict)
        hint = ". Of a model with pictures or sound, save the language model by itself" if is_multimodal else ""
        raise ConfigError(
            f"model_type {document.get('model_type')!r} is not supported; {', '.join(others)} and {last} are{hint}"
        )
    fields = Fields(document)
    _refuse_unsupported(fields, family)
    return family.read_config(fields)


def _refuse_unsupported(fields: Fields, family: Family) -> None:
    refused = dict(_REFUSED)
    is_switched_off = fields.value(_WINDOW_SWITCH) is False or (
        family.sliding_window == "switched" and _WINDOW_SWITCH not in fields
    )
    if family.sliding_window in ("read", "by layer") or is_switched_off:
        del refused["sliding_window"]
    for name, words in refused.items():
        if name in fields and fields.value(name) not in ({}, 0):
            fields.report(f"{name} is set; {words}")
    kinds = fields.value("layer_types") if family.sliding_window != "by layer" else None
    if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
        fields.report("layer_types names other kinds of layers than full_attention")
