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
    "grammar_lazy": (False,),
    "grammar_triggers": ([],),
    "id_slot": (-1,),
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
    "logprobs": "include",
    "max_completion_tokens": "max_output_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "messages": "input",
    "min_new_tokens": "min_tokens",
    "n_predict": "max_tokens",
    "n_probs": "logprobs",
    "reasoning_effort": "reasoning",
    "repeat_penalty": "repetition_penalty",
    "response_format": "text.format",
    "state_id": "previous_response_id",
    "t_max_predict_ms": "timeout",
    "functions": "tools",
    "function_call": "tool_choice",
}
"""Field -> the one that does the same here."""
COMPLETION_FIELDS: Mapping[str, tuple[Any, ...]] = {
    **_SHARED,
    "max_output_tokens": (),
    "prediction": (),
    "suffix": ("",),
}
CHAT_FIELDS: Mapping[str, tuple[Any, ...]] = {
    **_SHARED,
    "max_output_tokens": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
RESPONSE_FIELDS: Mapping[str, tuple[Any, ...]] = {
    **_SHARED,
    "context_management": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprob_token_ids": ([],),
    "logprobs": (False,),
    "max_completion_tokens": (),
    "max_tokens": (),
    "messages": (),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "prediction": (),
    "prompt": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "response_format": (),
    "return_state": (False,),
    "return_token_ids": (False,),
    "state_id": (),
    "verbosity": ("medium",),
}


def refuse_unsupported(body: object, fields: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises a 400 naming the first known field in `body` that this server cannot honour."""
    if not isinstance(body, dict):
        return
    for name, neutral_values in fields.items():
        value = body.get(name)
        if value is not None and not any(_same(value, neutral) for neutral in neutral_values):
            instead = _INSTEAD.get(name)
            if (fields is RESPONSE_FIELDS and instead == "max_tokens") or name in (
                "max_tokens",
                "max_completion_tokens",
            ):
                instead = "max_output_tokens"
            hint = "" if instead is None else f": use `{instead}`"
            message = f"`{name}` is not supported by this server{hint}"
            raise InvalidRequestError(message, param=name, code="unsupported_parameter")


def _same(value: object, neutral: object) -> bool:
    """Equality in which `true` is not 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
