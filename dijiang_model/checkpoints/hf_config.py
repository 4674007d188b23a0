"""The backbone of a Hugging Face `config.json` (GPT-NeoX, LLaMA, OPT) as a `ModelConfig`.

Both spellings of the rotary embedding are read: the old one (`rotary_pct`, `rotary_emb_base`,
`rope_theta`, `rope_scaling`) and that of transformers 5 (`rope_parameters`). Absent fields have the
defaults of the HF classes, except the dimensions, which must be there. What this code does not compute
(rope scaling, sliding windows, quantized weights, ...) is a ConfigError that lists all of it.
"""

from collections.abc import Mapping

from dijiang_model.config import AttentionConfig, Family, ModelConfig
from dijiang_model.errors import ConfigError
from dijiang_model.families.parts import ACTIVATIONS
from dijiang_model.formats.json_fields import Fields

MAX_LAYERS = 1024
DEFAULT_THETA = 10_000.0

_WINDOW_SWITCH = "use_sliding_window"
_REFUSED = {
    "sliding_window": "a sliding window",
    "quantization_config": "quantized weights",
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
}


def base_model_config(document: Mapping[str, object]) -> ModelConfig:
    """The network that an HF config describes; its layers have a default `AttentionConfig` each.

    `auto_map` is never followed.

    Raises:
        ConfigError: unsupported or contradictory values, all of them listed.
    """
    model_type = document.get("model_type")
    fields = Fields(document)
    _refuse_unsupported(fields)
    match model_type:
        case "gpt_neox":
            return _gpt_neox(fields)
        case "llama":
            return _llama(fields)
        case "opt":
            return _opt(fields)
    raise ConfigError(f"model_type {model_type!r} is not supported; gpt_neox, llama and opt are")


def eos_ids(value: object) -> tuple[int, ...] | None:
    """End-of-sequence ids from HF's `int | list[int] | null`; None if it is something else."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in values):
        return None
    return tuple(dict.fromkeys(values))


def _gpt_neox(fields: Fields) -> ModelConfig:
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    head_size = _head_size(fields, hidden_size, num_heads)
    theta, factor = _rope(fields, theta_name="rotary_emb_base", factor_name="rotary_pct", default_factor=0.25)
    return _common(
        fields,
        family="gpt_neox",
        num_kv_heads=num_heads,
        head_size=head_size,
        rotary_dims=int(head_size * factor),
        rope_theta=theta,
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        activation=fields.text("hidden_act", "gelu", choices=ACTIVATIONS),
        parallel_residual=fields.boolean("use_parallel_residual", True),
        attention_bias=fields.boolean("attention_bias", True),
        mlp_bias=True,
        default_token_ids=(0, 2),
    )


def _llama(fields: Fields) -> ModelConfig:
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    if "head_dim" in fields:
        head_size = fields.integer("head_dim")
    else:
        head_size = _head_size(fields, hidden_size, num_heads)
    theta, factor = _rope(fields, theta_name="rope_theta", factor_name="partial_rotary_factor", default_factor=1.0)
    if factor != 1:
        fields.report(f"partial_rotary_factor is {factor}, must be 1 for llama")
    fields.integer("pretraining_tp", 1)  # any value computes the same function, split differently
    return _common(
        fields,
        family="llama",
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_size=head_size,
        rotary_dims=head_size,
        rope_theta=theta,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=fields.text("hidden_act", "silu", choices=ACTIVATIONS),
        parallel_residual=False,
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
        default_token_ids=(1, 2),
    )


def _opt(fields: Fields) -> ModelConfig:
    hidden_size = fields.integer("hidden_size")
    pre_norm = fields.boolean("do_layer_norm_before", True)
    if pre_norm and fields.boolean("_remove_final_layer_norm", False):
        fields.report("_remove_final_layer_norm with do_layer_norm_before is not supported")
    if not fields.boolean("layer_norm_elementwise_affine", True):
        fields.report("layer_norm_elementwise_affine false is not supported")
    num_heads = fields.integer("num_attention_heads")
    has_bias = fields.boolean("enable_bias", True)
    embedding_size = fields.integer("word_embed_proj_dim", hidden_size)
    return _common(
        fields,
        family="opt",
        intermediate_name="ffn_dim",
        num_kv_heads=num_heads,
        head_size=_head_size(fields, hidden_size, num_heads),
        rotary_dims=0,
        rope_theta=DEFAULT_THETA,
        norm_eps=1e-5,
        activation=fields.text("activation_function", "relu", choices=ACTIVATIONS),
        parallel_residual=False,
        attention_bias=has_bias,
        mlp_bias=has_bias,
        is_tied_by_default=True,
        default_token_ids=(2, 2),
        pre_norm=pre_norm,
        embedding_size=embedding_size if embedding_size != hidden_size else 0,
    )


def _common(
    fields: Fields,
    *,
    family: Family,
    num_kv_heads: int,
    head_size: int,
    rotary_dims: int,
    rope_theta: float,
    norm_eps: float,
    activation: str,
    parallel_residual: bool,
    attention_bias: bool,
    mlp_bias: bool,
    default_token_ids: tuple[int, int],
    intermediate_name: str = "intermediate_size",
    is_tied_by_default: bool = False,
    pre_norm: bool = True,
    embedding_size: int = 0,
) -> ModelConfig:
    num_layers = fields.integer("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        fields.report(f"num_hidden_layers is {num_layers:,}, at most {MAX_LAYERS:,} are supported")
    num_heads = fields.integer("num_attention_heads")
    if num_heads % num_kv_heads:
        fields.report(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    if family != "opt" and (rotary_dims % 2 or not 2 <= rotary_dims <= head_size):
        fields.report(f"{rotary_dims} of {head_size} channels of a head rotate, must be an even number from 2")
    bos, eos, pad = _token_ids(fields, default_token_ids)
    vocab_size, hidden_size = fields.integer("vocab_size"), fields.integer("hidden_size")
    intermediate_size = fields.integer(intermediate_name)
    max_positions = fields.integer("max_position_embeddings", 2048)
    is_tied = fields.boolean("tie_word_embeddings", is_tied_by_default)
    fields.raise_if_any(f"unsupported or contradictory values in the {family} config")
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        rotary_dims=rotary_dims,
        rope_theta=rope_theta,
        max_position_embeddings=max_positions,
        norm_eps=norm_eps,
        activation=activation,
        parallel_residual=parallel_residual,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        tie_word_embeddings=is_tied,
        layers=(AttentionConfig(),) * num_layers,
        pre_norm=pre_norm,
        embedding_size=embedding_size,
        bos_token_id=bos,
        eos_token_ids=eos,
        pad_token_id=pad,
    )


def _head_size(fields: Fields, hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        fields.report(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    return max(hidden_size // num_heads, 1)


def _rope(fields: Fields, *, theta_name: str, factor_name: str, default_factor: float) -> tuple[float, float]:
    """Base and rotated share of each head; every kind of scaling is a problem."""
    parameters = fields.nested("rope_parameters")
    for name in ("rope_parameters", "rope_scaling"):
        kinds = fields.nested(name)
        kind = kinds.value("rope_type") if "rope_type" in kinds else kinds.value("type")
        if kind == "linear" and kinds.number("factor", 1.0) == 1:
            continue
        if kind not in (None, "default"):
            fields.report(f"{name} of type {kind!r} is not supported, only unscaled rotary embeddings are")
        elif any(isinstance(kinds.value(member), dict) for member in kinds.names()):
            fields.report(f"{name} differs between kinds of layers, which is not supported")
    theta = _either(fields, parameters, names=(theta_name, "rope_theta"), default=DEFAULT_THETA)
    factor = _either(fields, parameters, names=(factor_name, "partial_rotary_factor"), default=default_factor)
    if factor > 1:
        fields.report(f"{factor_name} is {factor}, must be at most 1")
    return theta, factor


def _either(fields: Fields, parameters: Fields, *, names: tuple[str, str], default: float) -> float:
    """The value from its old place, its new place, or both if they agree."""
    old_name, new_name = names
    old = fields.number(old_name, default)
    new = parameters.number(new_name, default)
    if old_name in fields and new_name in parameters and old != new:
        fields.report(f"{old_name} {old} contradicts rope_parameters.{new_name} {new}")
    return new if new_name in parameters else old


def _token_ids(fields: Fields, defaults: tuple[int, int]) -> tuple[int | None, tuple[int, ...], int | None]:
    default_bos, default_eos = defaults
    vocab_size = fields.integer("vocab_size")
    bos = _token_id(fields, "bos_token_id", default_bos, vocab_size)
    eos = eos_ids(fields.value("eos_token_id") if "eos_token_id" in fields.names() else default_eos)
    if eos is None or any(item >= vocab_size for item in eos):
        fields.report(f"eos_token_id is {fields.value('eos_token_id')!r}, must be ids below vocab_size {vocab_size}")
    pad = None if fields.value("pad_token_id") == -1 else _token_id(fields, "pad_token_id", None, vocab_size)
    return bos, eos or (), pad


def _token_id(fields: Fields, name: str, default: int | None, vocab_size: int) -> int | None:
    value = fields.value(name) if name in fields.names() else default
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
        fields.report(f"{name} is {value!r}, must be an id below vocab_size {vocab_size}")
        return None
    return value


def _refuse_unsupported(fields: Fields) -> None:
    for name, words in _REFUSED.items():
        is_off = fields.value(name) in ({}, 0) or (name == "sliding_window" and fields.value(_WINDOW_SWITCH) is False)
        if name in fields and not is_off:
            fields.report(f"{name} is set; {words} is not supported")
    kinds = fields.value("layer_types")
    if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
        fields.report("layer_types names other kinds of layers than full_attention")
