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
    "custom_logit_processor": (),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "ebnf": (),
    "grammar": ("",),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "id_slot": (-1,),
    "json_schema": ({},),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "lora": ([],),
    "lora_path": (),
    "max_new_tokens": (),
    "min_new_tokens": (),
    "mirostat": (0,),
    "mm_processor_kwargs": ({},),
    "n_predict": (),
    "n_probs": (0,),
    "prompt_embeds": (),
    "regex": (),
    "repeat_penalty": (1,),
    "repetition_detection": (),
    "return_hidden_states": (False,),
    "samplers": ([],),
    "spaces_between_special_tokens": (True,),
    "stop_regex": ([], ""),
    "structural_tag": (),
    "t_max_predict_ms": (0, -1),
    "tfs_z": (1,),
    "thinking_token_budget": (),
    "top_a": (0,),
    "top_n_sigma": (0, -1),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermark": (False,),
    "xtc_probability": (0,),
}
_INSTEAD: Mapping[str, str] = {
    "ebnf": "structured_outputs",
    "grammar": "structured_outputs",
    "guided_choice": "structured_outputs",
    "guided_grammar": "structured_outputs",
    "guided_json": "structured_outputs",
    "guided_regex": "structured_outputs",
    "json_schema": "response_format",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "n_predict": "max_tokens",
    "n_probs": "logprobs",
    "regex": "structured_outputs",
    "repeat_penalty": "repetition_penalty",
    "t_max_predict_ms": "timeout",
    "functions": "tools",
    "function_call": "tool_choice",
}
"""Field -> the one that does the same here."""
COMPLETION_FIELDS: Mapping[str, tuple[Any, ...]] = {
    **_SHARED,
    "prediction": (),
    "suffix": ("",),
}
CHAT_FIELDS: Mapping[str, tuple[Any, ...]] = {
    **_SHARED,
    "documents": ([],),
    "echo": (False,),
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
            hint = f": use `{_INSTEAD[name]}`" if name in _INSTEAD else ""
            message = f"`{name}` is not supported by this server{hint}"
            raise InvalidRequestError(message, param=name, code="unsupported_parameter")


def _same(value: object, neutral: object) -> bool:
    """Equality in which `true` is not 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
