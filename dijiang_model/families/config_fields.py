"""Reading HF configs: what the families' have in common.

Both spellings of the rotary embedding are read: the old one (`rotary_pct`, `rotary_emb_base`, `rope_theta`,
`rope_scaling`) and that of transformers 5 (`rope_parameters`). Absent fields have the defaults of the HF classes,
except the dimensions, which must be there. What this code does not compute is a problem of the fields.
"""

from dataclasses import dataclass

from dijiang_model.config import AttentionConfig, ModelConfig
from dijiang_model.formats.json_fields import Fields
from dijiang_model.rotary import RopeScaling, yarn_attention_factor

MAX_LAYERS = 1024
DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class Rope:
    """A config's rotary embedding: base, rotated share of each head, scaling."""

    theta: float
    share: float
    scaling: RopeScaling | None


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
    rope: Rope,
    norm_eps: float,
    activation: str,
    parallel_residual: bool,
    attention_bias: bool,
    mlp_bias: bool,
    default_token_ids: tuple[int | None, int | None],
    intermediate_name: str = "intermediate_size",
    is_tied_by_default: bool = False,
    pre_norm: bool = True,
    embedding_size: int = 0,
    rotates: bool = True,
) -> ModelConfig:
    """The network of a config whose family-specific values are given; raises ConfigError with all problems."""
    num_layers, num_heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
    if num_layers > MAX_LAYERS:
        fields.report(f"num_hidden_layers is {num_layers:,}, at most {MAX_LAYERS:,} are supported")
    if num_heads % num_kv_heads:
        fields.report(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    if rotates and (rotary_dims % 2 or not 2 <= rotary_dims <= head_size):
        fields.report(f"{rotary_dims} of {head_size} channels of a head rotate, must be an even number from 2")
    if rope.scaling is not None and rope.scaling.attention_factor != 1 and rotary_dims < head_size:
        fields.report("a yarn scaling of heads that rotate in part is not supported")
    bos, eos, pad = _token_ids(fields, default_token_ids)
    vocab_size, hidden_size, size = map(fields.integer, ("vocab_size", "hidden_size", intermediate_name))
    max_positions = fields.integer("max_position_embeddings", 2048)
    is_tied = fields.boolean("tie_word_embeddings", is_tied_by_default)
    fields.raise_if_any(f"unsupported or contradictory values in the {family} config")
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        rotary_dims=rotary_dims,
        rope_theta=rope.theta,
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
        rope_scaling=rope.scaling,
    )


def head_size_of(fields: Fields, hidden_size: int, num_heads: int) -> int:
    """Channels of a head where the config does not say."""
    if hidden_size % num_heads:
        fields.report(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    return max(hidden_size // num_heads, 1)


def read_rope(fields: Fields, *, theta_name: str, factor_name: str, default_factor: float) -> Rope:
    """Reads both spellings; a kind of scaling that is not computed here is a problem."""
    parameters = fields.nested("rope_parameters")
    scalings = [scaling_of(fields, fields.nested(name), name) for name in ("rope_parameters", "rope_scaling")]
    found = list(dict.fromkeys(scaling for scaling in scalings if scaling is not None))
    if len(found) > 1:
        fields.report("rope_parameters and rope_scaling scale the rotary embedding differently")
    theta = _either(fields, parameters, names=(theta_name, "rope_theta"), default=DEFAULT_THETA)
    factor = _either(fields, parameters, names=(factor_name, "partial_rotary_factor"), default=default_factor)
    if factor > 1:
        fields.report(f"{factor_name} is {factor}, must be at most 1")
    return Rope(theta, factor, found[0] if found else None)


def scaling_of(fields: Fields, values: Fields, name: str) -> RopeScaling | None:
    """The scaling that an object of a config describes; None: there is none, or a problem was reported.

    Args:
        values: the object.
        name: of it, for messages.
    """
    kind = values.value("rope_type") if "rope_type" in values else values.value("type")
    if any(isinstance(values.value(member), dict) for member in values.names()):
        fields.report(f"{name} differs between kinds of layers, which is not supported")
        return None
    original = _original_positions(fields, values)
    match kind:
        case None | "default":
            return None
        case "linear":
            factor = values.number("factor")
            return None if factor == 1 else RopeScaling("linear", factor)
        case "llama3":
            low, high = values.number("low_freq_factor"), values.number("high_freq_factor")
            if low >= high:
                fields.report(f"{name}: low_freq_factor {low} must be below high_freq_factor {high}")
            return RopeScaling("llama3", values.number("factor"), original, low, high)
        case "yarn":
            return _yarn(values, original)
    fields.report(f"{name} of type {kind!r} is not supported; default, linear, llama3 and yarn are")
    return None


def _yarn(values: Fields, original: int) -> RopeScaling:
    factor = values.number("factor")
    given = {name: values.number(name) for name in ("mscale", "mscale_all_dim") if name in values}
    return RopeScaling(
        "yarn",
        factor,
        original,
        values.number("beta_slow", 1.0),
        values.number("beta_fast", 32.0),
        values.boolean("truncate", True),
        values.number("attention_factor", yarn_attention_factor(factor, **given)),
    )


def _original_positions(fields: Fields, values: Fields) -> int:
    """Tokens of the range before the scaling, from its old place, its new one, or the whole range."""
    name = "original_max_position_embeddings"
    return values.integer(name, fields.integer(name, fields.integer("max_position_embeddings", 2048)))


def rope_document(config: ModelConfig) -> dict[str, object]:
    """The scaling as `read_rope` reads it; empty where there is none."""
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    values: dict[str, object] = {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_positions,
    }
    if scaling.kind == "llama3":
        values |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    if scaling.kind == "yarn":
        values |= {"beta_slow": scaling.low, "beta_fast": scaling.high, "truncate": scaling.is_truncated}
        values["attention_factor"] = scaling.attention_factor
    if scaling.kind == "linear":
        del values["original_max_position_embeddings"]
    return {"rope_scaling": values}


def _either(fields: Fields, parameters: Fields, *, names: tuple[str, str], default: float) -> float:
    """The value from its old place, its new place, or both if they agree."""
    old_name, new_name = names
    old = fields.number(old_name, default)
    new = parameters.number(new_name, default)
    if old_name in fields and new_name in parameters and old != new:
        fields.report(f"{old_name} {old} contradicts rope_parameters.{new_name} {new}")
    return new if new_name in parameters else old


def _token_ids(
    fields: Fields, defaults: tuple[int | None, int | None]
) -> tuple[int | None, tuple[int, ...], int | None]:
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
