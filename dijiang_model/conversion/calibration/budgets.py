"""Places for each head from a budget of bytes: the next one goes where it saves most of what is lost.

Layers in which the teacher sees a window alone keep that window, and get no places.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from dijiang_model.config import AnchorConfig, ModelConfig
from dijiang_model.errors import ConversionError
from dijiang_model.families import build_model
from dijiang_model.state import ALIGNMENT_BYTES

SMALLEST_WINDOW, LARGEST_WINDOW = 8, 64
"""Recent tokens that every head holds: a power of two between them, if possible at most a quarter of its places."""
AGE = 1e-4
"""What a priority gains with each token: an anchor fades by a factor of e in 10,000 tokens. With five times as much, a
tenth of the attention to facts told 1,000 to 2,000 tokens back is lost."""
PLACE_TENSORS = 6
"""Of a layer; each is aligned."""


@dataclass(frozen=True, slots=True)
class PlaceBudget:
    """What a state of so many bytes has room for.

    Attributes:
        window: recent tokens of each head.
        num_anchors: of all heads together, beside sinks and windows.
    """

    window: int
    num_anchors: int


def place_budget(config: ModelConfig, state_bytes: int, *, sinks: int) -> PlaceBudget:
    """Divides a state's bytes.

    Args:
        config: without anchors.

    Raises:
        ConversionError: there is no room for the smallest window; says how many bytes are needed.
    """
    shape = (len(config.global_layers), config.num_kv_heads)
    needed = _state_bytes(anchored_config(config, torch.zeros(shape), window=SMALLEST_WINDOW, sinks=sinks))
    if state_bytes < needed:
        kept = "" if config.local_layers is None else ", beside layers that keep the window that the teacher has there,"
        raise ConversionError(
            f"a state of {state_bytes:,} bytes is too small for this model: {sinks} sinks, a window of "
            f"{SMALLEST_WINDOW} tokens and the linear part{kept} take {needed:,} bytes; "
            f"give --state-bytes {needed} or more"
        )
    room = max(state_bytes - needed - shape[0] * PLACE_TENSORS * ALIGNMENT_BYTES, 0)
    more = room // _place_bytes(config)  # than that window
    num_heads, window = prod(shape), LARGEST_WINDOW
    while window > SMALLEST_WINDOW and 3 * window * num_heads > more + SMALLEST_WINDOW * num_heads:
        window //= 2
    return PlaceBudget(window, more - (window - SMALLEST_WINDOW) * num_heads)


def anchored_config(config: ModelConfig, anchors: Tensor, *, window: int, sinks: int) -> ModelConfig:
    """The network with so many anchors [L, G], and one recent window for all heads; L layers see everything."""
    layers = list(config.layers)
    for layer, own in zip(config.global_layers, (anchors + sinks + window).int().tolist(), strict=True):
        places = AnchorConfig(tuple(own), (window,) * len(own), age=AGE)
        layers[layer] = replace(layers[layer], window=window, sinks=sinks, anchors=places)
    return replace(config, layers=tuple(layers))


def allocate(losses: Tensor, sizes: Sequence[int], *, num_anchors: int, most: int) -> Tensor:
    """Anchors for each head, [L, G] int64, together at most `num_anchors`.

    Step by step that head grows whose larger size saves the most loss for each anchor. What is left when nothing can be
    saved any more is shared out evenly.

    Args:
        losses: [L, G, M], of each head with each of the sizes.
        sizes: ascending from 0.
        most: no head gets more.
    """
    flat, size = losses.flatten(0, 1).double(), torch.tensor(sizes)
    chosen, spare = torch.zeros(len(flat), dtype=torch.int64), num_anchors
    while True:
        cost = size - size[chosen][:, None]  # [heads, M]
        saved = flat.gather(1, chosen[:, None]) - flat
        gain = torch.where((cost > 0) & (cost <= spare), saved / cost.clamp(min=1), 0.0)
        head, step = divmod(int(gain.argmax()), len(sizes))
        if gain[head, step] <= 0:
            break
        spare -= int(cost[head, step])
        chosen[head] = step
    return (size[chosen] + spare // len(flat)).clamp(max=most).view(losses.shape[:2])


def _state_bytes(config: ModelConfig) -> int:
    return build_model(config, device="meta", dtype=torch.float32).state_spec.bytes_per_slot


def _place_bytes(config: ModelConfig) -> int:
    """Key and value in int8, their scales, position and score."""
    return 2 * config.head_size + 4 * torch.float32.itemsize
