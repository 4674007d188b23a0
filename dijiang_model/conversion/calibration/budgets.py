"""Places for each head from a budget of bytes: the next one goes where it saves most of what is lost.

Layers in which the teacher sees a window alone keep that window, and get no places.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dijiang_model.config import AnchorConfig, ModelConfig
from dijiang_model.errors import ConversionError
from dijiang_model.families import build_model
from dijiang_model.state import ALIGNMENT_BYTES

SMALLEST_WINDOW, LARGEST_WINDOW = 8, 64
"""Recent tokens that every head holds: a power of two between them, if possible at most a quarter of its places."""
FEW_PLACES = 400
"""Below so many places a head on average, values of 4 bits: the places that they leave room for are worth more."""
PRICED_SHARE = 0.1
"""The price of a place is what so large a share of them saves."""
PLACE_TENSORS = 6
"""Of a layer; each is aligned."""


@dataclass(frozen=True, slots=True)
class PlaceBudget:
    """What a state of so many bytes has room for.

    Attributes:
        window: recent tokens of each head.
        num_anchors: of all heads together, beside sinks and windows.
        value_bits: of the numbers of a value in a place, 8 or 4.
    """

    window: int
    num_anchors: int
    value_bits: int


def with_features(config: ModelConfig, width: int | None) -> ModelConfig:
    """The network with so many features of the linear part in each layer that sees everything; 0: no linear part.

    They are those before the rotary embedding: what is evicted lies at any distance.
    """
    layers = list(config.layers)
    for layer in config.global_layers:
        layers[layer] = replace(layers[layer], features=replace(layers[layer].features, width=width, rotated=False))
    return replace(config, layers=tuple(layers))


def place_budget(config: ModelConfig, state_bytes: int, *, sinks: int) -> PlaceBudget:
    """Divides a state's bytes.

    Args:
        config: without anchors.

    Raises:
        ConversionError: there is no room for the smallest window; says how many bytes are needed.
    """
    exact, small = (_budget(config, state_bytes, sinks=sinks, value_bits=bits) for bits in (8, 4))
    num_heads = len(config.global_layers) * config.num_kv_heads
    is_enough = exact is not None and exact.num_anchors / num_heads + exact.window + sinks >= FEW_PLACES
    budget = exact if is_enough else small
    if budget is None:
        needed = _smallest(config, sinks=sinks, value_bits=4)
        kept = "" if config.local_layers is None else ", beside layers that keep the window that the teacher has there,"
        raise ConversionError(
            f"a state of {state_bytes:,} bytes is too small for this model: {sinks} sinks, a window of "
            f"{SMALLEST_WINDOW} tokens and what else a state has{kept} take {needed:,} bytes; "
            f"give --state-bytes {needed} or more"
        )
    return budget


def _budget(config: ModelConfig, state_bytes: int, *, sinks: int, value_bits: int) -> PlaceBudget | None:
    needed = _smallest(config, sinks=sinks, value_bits=value_bits)
    if state_bytes < needed:
        return None
    room = max(state_bytes - needed - len(config.global_layers) * PLACE_TENSORS * ALIGNMENT_BYTES, 0)
    more = room // AnchorConfig((), (), value_bits=value_bits).place_bytes(config.head_size)  # than that window
    num_heads, window = len(config.global_layers) * config.num_kv_heads, LARGEST_WINDOW
    while window > SMALLEST_WINDOW and 3 * window * num_heads > more + SMALLEST_WINDOW * num_heads:
        window //= 2
    return PlaceBudget(window, more - (window - SMALLEST_WINDOW) * num_heads, value_bits)


def anchored_config(config: ModelConfig, anchors: Tensor, *, window: int, sinks: int, value_bits: int) -> ModelConfig:
    """The network with so many anchors [L, G], and one recent window for all heads; L layers see everything."""
    layers = list(config.layers)
    for layer, own in zip(config.global_layers, (anchors + sinks + window).int().tolist(), strict=True):
        places = AnchorConfig(tuple(own), (window,) * len(own), value_bits=value_bits)
        layers[layer] = replace(layers[layer], window=window, sinks=sinks, anchors=places)
    return replace(config, layers=tuple(layers))


def _smallest(config: ModelConfig, *, sinks: int, value_bits: int) -> int:
    """Bytes of a state with the smallest window and no anchors."""
    nothing = torch.zeros((len(config.global_layers), config.num_kv_heads))
    small = anchored_config(config, nothing, window=SMALLEST_WINDOW, sinks=sinks, value_bits=value_bits)
    return build_model(small, device="meta", dtype=torch.float32).state_spec.bytes_per_slot


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


def linear_parts_that_pay(config: ModelConfig, losses: Tensor, sizes: Sequence[int], saved: Tensor) -> list[bool]:
    """Whether each layer's linear part saves more than the places that its bytes could hold; L layers see everything.

    Args:
        config: with its places, and a linear part in each of the L layers.
        losses: [L, G, M], of each head with each of the sizes.
        saved: [L, G], the share of them that the linear part saves.
    """
    places = [layer.anchors for layer in config.layers if layer.anchors is not None]
    anchors = torch.tensor([own.places for own in places]) - torch.tensor([own.windows for own in places])
    anchors = anchors - config.layers[config.global_layers[0]].sinks
    fewer = (anchors * (1 - PRICED_SHARE)).long()
    now = _at(losses, sizes, anchors)
    price = (_at(losses, sizes, fewer) - now).sum() / (anchors - fewer).sum().clamp(min=1)  # of a place
    place_bytes = places[0].place_bytes(config.head_size)
    found = []
    for number, layer in enumerate(config.global_layers):
        width = config.num_features(layer)
        num_bytes = config.num_kv_heads * width * (config.head_size + 1) * torch.float32.itemsize
        found.append(bool((now[number] * saved[number]).sum() > price * num_bytes / place_bytes))
    return found


def _at(losses: Tensor, sizes: Sequence[int], anchors: Tensor) -> Tensor:
    """[L, G] losses with so many anchors, between two sizes on a straight line."""
    size = torch.tensor(sizes)
    above = torch.bucketize(anchors, size).clamp(1, len(sizes) - 1)
    low, high = size[above - 1], size[above]
    share = ((anchors - low) / (high - low)).clamp(0, 1)
    at = [losses.gather(-1, index[..., None])[..., 0] for index in (above - 1, above)]
    return torch.lerp(at[0], at[1], share)
