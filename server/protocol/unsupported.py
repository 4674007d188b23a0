"""Known fields that this server does not build: refused by name unless they ask for nothing.

A client that sends such a field expects its effect, so ignoring it would be a silent lie. Fields that
are no part of any known API are ignored, and so are `user`, `metadata`, `store` and
`service_tier`, which ask for nothing that changes an answer.
"""

from collections.abc import Mapping
from typing import Any

from server.errors import InvalidRequestError

# Field -> values besides null that ask for nothing.
_SHARED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1,),
    "prompt_embeds": (),
    "use_beam_search": (False,),
}
COMPLETION_FIELDS: Mapping[str, tuple[Any, ...]] = {
    **_SHARED,
    "prediction": (),
    "suffix": ("",),
}
CHAT_FIELDS: Mapping[str, tuple[Any, ...]] = {
    **_SHARED,
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def refuse_unsupported(body: object, fields: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises a 400 naming the first known field in `body` that this server cannot honour."""
    if not isinstance(body, dict):
        return
    for name, neutral_values in fields.items():
        value = body.get(name)
        if value is not None and not any(_same(value, neutral) for neutral in neutral_values):
            raise InvalidRequestError(
                f"`{name}` is not supported by this server", param=name, code="unsupported_parameter"
            )


def _same(value: object, neutral: object) -> bool:
    """Equality in which `true` is not 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
