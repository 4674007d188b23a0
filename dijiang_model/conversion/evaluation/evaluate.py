"""What a conversion lost and what its linear part brings, on text that training never saw.

Negative log-likelihoods are means over all predicted tokens of a range of positions, in nats, of windows that
each start from an empty state. Everything runs through the same blocks: the teacher with full causal softmax,
the training-free window of equal state bytes with the teacher's weights, the model itself, and the model with
its linear part or its window switched off.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dijiang_model.batch import prefill
from dijiang_model.conversion.calibration.calibrate import Calibration
from dijiang_model.conversion.evaluation.ablations import silenced, with_config
from dijiang_model.errors import ConversionError
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops import AttentionOp
from dijiang_model.ops.training.attention import HybridAttention, SoftmaxAttention, WindowAttention
from dijiang_model.segments import run_segments
from dijiang_model.serving.network import freeze
from dijiang_model.state import StateBuffer

EDGES = (0, 64, 256, 1024, 2048)
"""Position ranges: 0-64, 64-256, 256-1024, 1024-2048, and 2048 and beyond."""
FAR_FROM = 256
"""From here on the target of a conversion is stated."""
HEAD_ROWS = 512
SEGMENT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Variant:
    """A model with an attention.

    Attributes:
        name: for tables.
        state_bytes: of one conversation; None: it grows with the text.
        is_served: read through a state, as a server does, instead of all at once; `op` does not count then.
    """

    name: str
    model: DiJiangForCausalLM
    op: AttentionOp
    state_bytes: int | None
    is_served: bool = False


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over tokens by position range.

    Attributes:
        losses: [ranges] summed negative log-likelihoods, nats.
        counts: [ranges] tokens.
    """

    losses: Tensor
    counts: Tensor

    @property
    def means(self) -> list[float | None]:
        """By range; None where there are no tokens."""
        return [float(loss / count) if count else None for loss, count in zip(self.losses, self.counts, strict=True)]

    @property
    def far(self) -> float | None:
        """Mean over all positions from `FAR_FROM` on."""
        start = EDGES.index(FAR_FROM)
        count = float(self.counts[start:].sum())
        return float(self.losses[start:].sum()) / count if count else None


def variants(
    model: DiJiangForCausalLM,
    teacher: DiJiangForCausalLM,
    *,
    control: DiJiangForCausalLM | None = None,
    ablations: bool = True,
) -> list[Variant]:
    """What is compared, the teacher, the window of equal bytes and ours first; ablations where the model has a window.

    With anchors, what has a constant state is read as it is served.

    Args:
        control: a model that was trained like ours, of which the window alone is taken.
        ablations: whether parts of the model are switched off too.

    Raises:
        ConversionError: the control has a layer without a window.
    """
    own_bytes = model.state_spec.bytes_per_slot
    layers = model.config.layers
    has_anchors = any(layer.anchors is not None for layer in layers)
    sinks = max(layer.sinks for layer in model.config.layers) or 4
    window = equal_window(model, sinks=sinks)
    plain = silenced(teacher, window=window, sinks=sinks).keep_states_in(torch.int8) if has_anchors else teacher
    found = [
        Variant("teacher", teacher, SoftmaxAttention(), None),
        Variant(f"window {window}+{sinks}, no training", plain, WindowAttention(window, sinks), own_bytes, has_anchors),
        Variant("ours", model, HybridAttention(), own_bytes, has_anchors),
    ]
    if has_anchors and ablations:
        found.append(Variant("ours, anchors off", model, HybridAttention(window=layers[0].window), own_bytes))
        if any(bool(attention.linear.mix_bias.isfinite().any()) for attention in model.attentions):
            found.append(Variant("ours, linear part off", silenced(model), HybridAttention(), own_bytes, True))
    elif ablations and all(layer.window > 0 for layer in layers):
        found += [
            Variant("ours, linear part off", model, WindowAttention(), own_bytes),
            Variant("ours, window off", model, HybridAttention(window=1), own_bytes),
        ]
    if control is not None:
        found.append(_control(control))
    return found


def budget_variants(
    model: DiJiangForCausalLM, calibration: Calibration | None, budgets: Sequence[int]
) -> list[Variant]:
    """The model with states of other sizes, divided by the losses that its calibration measured.

    Raises:
        ConversionError: there was no calibration, or a budget is too small.
    """
    if calibration is None:
        if budgets:
            raise ConversionError("only a model that was converted with --state-bytes can have states of other sizes")
        return []
    found = []
    for num_bytes in budgets:
        resized = with_config(model, calibration.config(model.config, state_bytes=num_bytes))
        found.append(sized_variant(resized, num_bytes))
    return found


def sized_variant(model: DiJiangForCausalLM, num_bytes: int | None = None) -> Variant:
    """A model with a state of another size; by default it is called by what its state takes."""
    taken = model.state_spec.bytes_per_slot
    name = f"ours, {(taken if num_bytes is None else num_bytes) / 2**20:.4g} MiB"
    return Variant(name, model, HybridAttention(), taken, is_served=True)


def _control(control: DiJiangForCausalLM) -> Variant:
    layers = control.config.layers
    if any(layer.window == 0 for layer in layers):
        raise ConversionError("the control has a layer without a window, which is all that is taken of it")
    sizes = " or ".join(sorted({f"{layer.window}+{layer.sinks}" for layer in layers}))
    num_bytes = sum(layer.window + layer.sinks for layer in layers) * window_token_bytes(control)
    return Variant(f"window {sizes}, trained alike", control, WindowAttention(), num_bytes)


def window_token_bytes(model: DiJiangForCausalLM) -> int:
    """Key and value of one token in one layer, stored as the model stores them."""
    config = model.config
    if any(layer.anchors is not None for layer in config.layers):
        return 2 * config.num_kv_heads * (config.head_size + torch.float32.itemsize)  # int8, and a scale
    return 2 * config.num_kv_heads * config.head_size * model.dtype.itemsize


def equal_window(model: DiJiangForCausalLM, *, sinks: int) -> int:
    """The window that, with the sinks, in every layer alike, takes as many bytes as the model's state."""
    row_bytes = model.config.num_layers * window_token_bytes(model)
    return max(model.state_spec.bytes_per_slot // row_bytes - sinks, 1)


@torch.inference_mode()
def score(variant: Variant, windows: Sequence[Tensor], *, on_window: Callable[[], None] = lambda: None) -> Score:
    """Likelihood of windows [T] int64, each on its own."""
    losses = torch.zeros(len(EDGES), dtype=torch.float64)
    counts = torch.zeros(len(EDGES), dtype=torch.float64)
    edges = torch.tensor(EDGES[1:])
    for window in windows:
        window = window.to(variant.model.device)
        loss = token_scores(variant, window)[0].double().cpu()
        ranges = torch.bucketize(torch.arange(1, len(window)), edges, right=True)
        losses.index_add_(0, ranges, loss)
        counts.index_add_(0, ranges, torch.ones_like(loss))
        on_window()
    return Score(losses, counts)


def served_logits(model: DiJiangForCausalLM, window: Tensor) -> Iterator[Tensor]:
    """Next-token logits of all tokens but the last, read in segments into a state as a server does."""
    served = freeze(model)
    state = StateBuffer(served.state_spec, 1, window.device)
    state.storage.zero_()
    slots = torch.zeros(1, dtype=torch.int64, device=window.device)
    for start in range(0, len(window) - 1, SEGMENT_TOKENS):
        tokens = window[start : min(start + SEGMENT_TOKENS, len(window) - 1)]
        starts = torch.tensor([start], device=window.device)
        yield prefill(served, tokens, lengths=[len(tokens)], slots=slots, starts=starts, state=state)


def token_scores(variant: Variant, window: Tensor) -> tuple[Tensor, Tensor]:
    """Of all tokens but the first of a window [T]: negative log-likelihoods [T - 1], and whether each is the argmax."""
    if variant.is_served:
        parts = served_logits(variant.model, window)
    else:
        hidden = run_segments(variant.model, window[None], variant.op)[:-1]
        parts = (variant.model.logits(rows) for rows in hidden.split(HEAD_ROWS))
    losses, hits, start = [], [], 1
    for logits in parts:
        targets = window[start : start + len(logits)]
        losses.append(functional.cross_entropy(logits, targets, reduction="none"))
        hits.append(logits.argmax(-1) == targets)
        start += len(logits)
    return torch.cat(losses), torch.cat(hits)


def gap_closed(scores: Mapping[str, Score], names: Sequence[str]) -> float | None:
    """Share of the gap between the window of equal bytes and the teacher that the model closes, from `FAR_FROM` on.

    Args:
        names: of teacher, window and model.
    """
    teacher, window, ours = (scores[name].far for name in names)
    if teacher is None or window is None or ours is None or window <= teacher:
        return None
    return (window - ours) / (window - teacher)
