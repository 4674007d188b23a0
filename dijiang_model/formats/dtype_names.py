"""Short names of number formats, as people type them."""

from collections.abc import Mapping

ALIASES: Mapping[str, str] = {
    **dict.fromkeys(("fp32", "f32", "float"), "float32"),
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    "bf16": "bfloat16",
}


def dtype_name(value: object) -> object:
    """Returns the full name of a short one, and everything else as it is."""
    return ALIASES.get(value.strip().lower(), value) if isinstance(value, str) else value
