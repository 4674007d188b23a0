"""The softmax model that a DiJiang model was made from, in HF transformers, on the same weights in memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.utils import logging

from dijiang_model.model import DiJiangForCausalLM

CacheKind = Literal["dynamic", "static"]


def transformers_twin(folder: Path, model: DiJiangForCausalLM) -> Any:
    """HF's model with scaled-dot-product attention; its tensors are those of `model`, not copies."""
    logging.set_verbosity_error()
    base = json.loads((folder / "config.json").read_text())["base"]
    config = AutoConfig.for_model(base.pop("model_type"), **base)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=model.dtype)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".linear." not in name}
    # `assign` on the meta device; buffers such as rotary frequencies are computed anew below.
    twin.load_state_dict(tensors, strict=False, assign=True)
    twin.tie_weights()
    rotary = type(twin.model.rotary_emb)(config=config).to(model.device)
    twin.model.rotary_emb = rotary
    missing = [name for name, tensor in twin.named_parameters() if tensor.is_meta]
    assert not missing, missing
    return twin.eval()


def cache_of(twin: Any, *, num_rows: int, num_tokens: int, kind: CacheKind, room: int) -> Any:
    """A key-value cache that holds `num_tokens` random tokens of each row, and has room for some more."""
    config = twin.config
    if kind == "dynamic":
        cache = DynamicCache(config=config)
    else:
        cache = StaticCache(config=config, max_cache_len=num_tokens + room)
    shape = (num_rows, config.num_key_value_heads, num_tokens, config.head_dim)
    positions = torch.arange(num_tokens, device=twin.device)
    like = {"device": twin.device, "dtype": twin.dtype}
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape, **like), torch.randn(shape, **like), layer, {"cache_position": positions})
    return cache


def decode_step(twin: Any, *, num_rows: int, num_tokens: int, kind: CacheKind, num_steps: int) -> Callable[[], Tensor]:
    """One step of `generate` without its bookkeeping: forward pass of one token a row, then the largest logit."""
    cache = cache_of(twin, num_rows=num_rows, num_tokens=num_tokens, kind=kind, room=num_steps)
    token_ids = torch.full((num_rows, 1), min(500, twin.config.vocab_size - 1), device=twin.device)
    position = num_tokens

    def step() -> Tensor:
        nonlocal position
        output = twin(
            token_ids,
            past_key_values=cache,
            use_cache=True,
            position_ids=torch.full((num_rows, 1), position, device=twin.device),
            logits_to_keep=1,
        )
        position += 1
        largest: Tensor = output.logits[:, -1].argmax(-1)
        return largest

    return step
