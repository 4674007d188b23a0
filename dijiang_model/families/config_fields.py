"""Reading HF configs: what the families' have in common.

Both spellings of the rotary embedding are read: the old one (`rotary_pct`, `rotary_emb_base`, `rope_theta`,
`rope_scaling`) and that of transformers 5 (`rope_parameters`). Absent fields have the defaults of the HF classes,
except the dimensions, which must be there. What this code does not compute is a problem of the fields.
"""

from dijiang_model.config import AttentionConfig, ModelConfig
from dijiang_model.formats.json_fields import Fields

MAX_LAYERS = 1024
DEFAULT_THETA = 10_000.0


def eos_ids(value: object) -> tuple[int, ...] | None:
    """End-of-sequence ids from HF's `int | list[int] | null`; None if it is something else."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in values):
        return None
    return tuple(dict.fromkeys(values))


def common_config(
    fields: Fields,
    *,
    family: str,
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
    rotates: bool = True,
) -> ModelConfig:
    """The network of a config whose family-specific values are given; raises ConfigError with all problems."""
    num_layers = fields.integer("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        fields.report(f"num_hidden_layers is {num_layers:,}, at most {MAX_LAYERS:,} are supported")
    num_heads = fields.integer("num_attention_heads")
    if num_heads % num_kv_heads:
        fields.report(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    if rotates and (rotary_dims % 2 or not 2 <= rotary_dims <= head_size):
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


def head_size_of(fields: Fields, hidden_size: int, num_heads: int) -> int:
    """Channels of a head where the config does not say."""
    if hidden_size % num_heads:
        fields.report(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    return max(hidden_size // num_heads, 1)


def read_rope(fields: Fields, *, theta_name: str, factor_name: str, default_factor: float) -> tuple[float, float]:
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
