"""Tokens a second by context: one conversation, one token at a time, as it would be generated."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from dijiang_model.batch import decode
from dijiang_model.kernel import LinearKernel
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import LayerState
from dijiang_model.ops.layout import StepLayout
from dijiang_model.serving.network import freeze
from dijiang_model.state import StateBuffer

CONTEXTS = (128, 1024, 2048, 8192, 32_768)
NUM_STEPS, WARM_UP_STEPS = 12, 3
SLOT = 1


@dataclass(frozen=True, slots=True)
class Speed:
    """One context.

    Attributes:
        context: tokens before the measured ones.
        ours, teacher: tokens a second; the teacher's None beyond its range.
        state_bytes, cache_bytes: of a conversation: our state, and the teacher's keys and values.
    """

    context: int
    ours: float
    teacher: float | None
    state_bytes: int
    cache_bytes: int


@dataclass(slots=True)
class GrowingCache:
    """The teacher's attention for one conversation, token by token: an `AttentionOp` that keeps every key and value.

    Random ones stand for the context's: what they hold does not change what a step costs.

    Attributes:
        capacity: tokens that the cache has room for.
        caches: by identity of the kernel: keys and values [G, capacity, d].
    """

    capacity: int
    caches: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, kernel: LinearKernel, layout: StepLayout, state: LayerState
    ) -> Tensor:
        """See `ops.AttentionOp`; `state` is not touched."""
        assert len(q) == 1
        place = int(layout.positions[0])
        if id(kernel) not in self.caches:
            empty = k.new_empty((k.shape[1], self.capacity, k.shape[2]))
            self.caches[id(kernel)] = (empty.normal_(), torch.empty_like(empty).normal_())
        keys, values = self.caches[id(kernel)]
        keys[:, place] = layout.rotary.apply(k)[0]
        values[:, place] = v[0]
        query = layout.rotary.apply(q)[0][:, None]  # [H, 1, d]
        attended = functional.scaled_dot_product_attention(
            query[None], keys[None, :, : place + 1], values[None, :, : place + 1], enable_gqa=True
        )
        return attended[0].transpose(0, 1)


def measure_speed(
    model: DiJiangForCausalLM,
    teacher: DiJiangForCausalLM,
    *,
    contexts: Sequence[int] = CONTEXTS,
    on_context: Callable[[], None] = lambda: None,
) -> list[Speed]:
    """Times steps of both at each context; medians, so that a busy moment of the machine does not count."""
    longest = teacher.config.max_position_embeddings
    found = []
    for context in contexts:
        fits = context + NUM_STEPS + WARM_UP_STEPS <= longest
        found.append(
            Speed(
                context,
                ours=_tokens_per_s(model, context),
                teacher=_tokens_per_s_of_teacher(teacher, context) if fits else None,
                state_bytes=model.state_spec.bytes_per_slot,
                cache_bytes=context * cache_token_bytes(teacher),
            )
        )
        on_context()
    return found


def cache_token_bytes(teacher: DiJiangForCausalLM) -> int:
    """Keys and values of one token in all layers, in the weights' dtype."""
    config = teacher.config
    return 2 * config.num_layers * config.num_kv_heads * config.head_size * teacher.dtype.itemsize


def _tokens_per_s_of_teacher(teacher: DiJiangForCausalLM, context: int) -> float:
    own = teacher.attention_op
    teacher.attention_op = GrowingCache(context + NUM_STEPS + WARM_UP_STEPS)
    try:
        return _tokens_per_s(teacher, context)
    finally:
        teacher.attention_op = own


@torch.inference_mode()
def _tokens_per_s(network: DiJiangForCausalLM, context: int) -> float:
    model = freeze(network)
    state = StateBuffer(model.state_spec, SLOT + 1, model.device)
    state.storage.zero_()
    token = torch.zeros(1, dtype=torch.int64, device=model.device)
    slots = torch.full_like(token, SLOT)
    times = []
    for step in range(NUM_STEPS + WARM_UP_STEPS):
        started = time.perf_counter()
        logits = decode(model, token, slots=slots, positions=token.new_full((1,), context + step), state=state)
        token = logits.argmax(-1)
        token.tolist()  # waits for the device
        times.append(time.perf_counter() - started)
    return 1 / statistics.median(times[WARM_UP_STEPS:])
