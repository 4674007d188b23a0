"""The softmax model that a DiJiang model was made from, in HF transformers, on the same weights in memory."""

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.utils import logging

from benchmarks.contenders import load_weights
from benchmarks.machine import is_cuda, kind_of_twin
from dijiang_model.model import DiJiangForCausalLM

CacheKind = Literal["dynamic", "static"]
PAGE_TOKENS = 256
READ_TOKENS = 2048


def transformers_twin(folder: Path, model: DiJiangForCausalLM) -> Any:
    """HF's model with scaled-dot-product attention; its tensors are those of `model`, not copies."""
    logging.set_verbosity_error()
    getLogger("ContinuousBatchingLogger").setLevel(CRITICAL)  # what goes wrong there is told by the error
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


def twins_of(folder: Path, models: Mapping[str, DiJiangForCausalLM]) -> dict[str, Any]:
    """HF's model in each kind of plain weights that one of ours, by kind, is compared with (`kind_of_twin`); on a CPU
    in fp32 too. A kind that is not among ours is read from the folder."""
    device = str(next(iter(models.values())).device)
    kinds = dict.fromkeys([*([] if is_cuda(device) else ["fp32"]), *map(kind_of_twin, models)])
    plain = {kind: models[kind] if kind in models else load_weights(folder, kind, device=device) for kind in kinds}
    return {kind: transformers_twin(folder, model) for kind, model in plain.items()}


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


class Compiled:
    """HF's model with its forward pass compiled for the shapes that come."""

    def __init__(self, twin: Any) -> None:
        compiled: Any = torch.compile
        self._forward = compiled(twin, dynamic=False)
        self.config, self.device, self.dtype = twin.config, twin.device, twin.dtype

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self._forward(*inputs, **options)


def token_times(twin: Any, *, num_rows: int, num_tokens: int, num_times: int) -> list[float]:
    """Seconds between tokens of `num_rows` requests in HF's continuous batching, behind `num_tokens` each.

    The requests' prompts are equal, so that one is read and its pages are shared; a token's keys and values are looked
    up page by page for each request all the same.

    Raises:
        RuntimeError: it stopped without an answer.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig  # not in every version that has the rest

    prompt = [500 + place % 1000 for place in range(num_tokens)]
    prompt = [token % twin.config.vocab_size for token in prompt]
    pages = num_rows * (-(-(num_tokens + num_times + num_rows + 8) // PAGE_TOKENS) + 1)
    settings = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=pages,
        max_batch_tokens=max(num_rows, min(num_tokens, READ_TOKENS)),
        max_requests_per_batch=num_rows,
    )
    config = GenerationConfig(do_sample=False, max_new_tokens=num_times + num_rows + 4, eos_token_id=-1, pad_token_id=0)
    options = {"generation_config": config, "continuous_batching_config": settings, "warmup": False}
    with twin.continuous_batching_context_manager(timeout=5, **options) as manager:
        first = manager.add_request(prompt, max_new_tokens=1)
        _result(manager, {first})
        names = {manager.add_request(prompt, record_timestamps=True) for _ in range(num_rows)}
        answers = [_result(manager, names) for _ in range(num_rows)]
    # When the last one has begun, all of them are in every step until the first one ends.
    begun = max(answer.timestamps[0] for answer in answers)
    first_one = min(answers, key=lambda answer: answer.timestamps[0])
    together = [moment for moment in first_one.timestamps if moment >= begun]
    gaps = [later - earlier for earlier, later in pairwise(together)][-num_times:]
    if len(gaps) < num_times:
        raise RuntimeError(f"its requests were together in {len(gaps)} steps only")
    return gaps


def _result(manager: Any, names: set[str]) -> Any:
    """The next finished one of these requests."""
    while True:
        answer = manager.get_result(timeout=1)
        if answer is not None and answer.request_id in names and answer.is_finished():
            if answer.error is not None:
                raise RuntimeError(answer.error)
            return answer
        if answer is None and not manager.is_running():
            raise RuntimeError("its generation thread has ended")
