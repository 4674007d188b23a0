"""What the linear part adds to the places: how much it counts, fitted to the teacher's answers without gradients.

A head answers A = (1 - s) near + s far, where near is the mean of the values that it holds, far that of the evicted,
and s = sigmoid(w . q + a + log(most F / held)): `most` and `held` are the largest and the summed probability of what
it holds, F the summed decays of the evicted, which have one constant feature. Everything but w and a is known from the
teacher, and the squared error is c s + h s^2 for each query: a damped Gauss-Newton iteration over d + 1 numbers.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dijiang_model.config import AnchorConfig, ModelConfig
from dijiang_model.conversion.calibration.contexts import Context
from dijiang_model.conversion.calibration.far_attention import probabilities
from dijiang_model.conversion.calibration.head_losses import priorities, ranks
from dijiang_model.conversion.calibration.teacher_pass import LayerInputs, ReadTensor, teacher_layers
from dijiang_model.conversion.training.distill import output_weight
from dijiang_model.model import DiJiangForCausalLM
from dijiang_model.ops.layout import Rotary

WIDTH = 1
"""Features of a layer's linear part, then a decayed mean of what is evicted. Neither 16 nor 64 gain more."""
HALF_LIVES = (100.0, 400.0, 1600.0)
"""Tokens; each head takes the one that fits best."""
NUM_FITTED, NUM_JUDGED = 6, 4
"""Contexts that are fitted to, and on which it is judged what that saves."""
ROW_STRIDE = 10
ITERATIONS = 6
PENALTY = 0.005
LARGEST_LOGIT = 4.0


@dataclass(frozen=True, slots=True)
class LinearFit:
    """One layer's linear part.

    Attributes:
        log_decay: [G].
        mix_bias, mix_weight: [H] and [H, d]; a bias of -inf where a head is better without.
        without, saved: [G], the loss with places alone, and how much less it is, on contexts that were not fitted to.
    """

    log_decay: Tensor
    mix_bias: Tensor
    mix_weight: Tensor
    without: Tensor
    saved: Tensor


@dataclass(frozen=True, slots=True)
class _Rows:
    """Queries of one query head: the squared error of its answers is `without` + 2 c s + h s^2.

    Attributes:
        offset: log(most F / held).
        queries: [N, d], as the mixing weight reads them.
        answers: bool, where a fact is answered.
    """

    without: Tensor
    c: Tensor
    h: Tensor
    offset: Tensor
    queries: Tensor
    answers: Tensor

    @classmethod
    def joined(cls, parts: Sequence["_Rows"]) -> "_Rows":
        """All rows; running text and answers to facts weigh the same, each as a mean."""
        columns = zip(*((p.without, p.c, p.h, p.offset, p.queries, p.answers) for p in parts), strict=True)
        without, c, h, offset, queries, answers = (torch.cat(column) for column in columns)
        num = torch.where(answers, answers.sum(), (~answers).sum())
        return cls(without / num, c / num, h / num, offset, queries, answers)

    def change(self, weight: Tensor, bias: Tensor) -> Tensor:
        """What the linear part adds to the loss."""
        share = torch.sigmoid(self.offset + self.queries @ weight + bias)
        return (2 * self.c * share + self.h * share.square()).sum()


@torch.no_grad()
def fit_linear_parts(
    model: DiJiangForCausalLM,
    read: ReadTensor,
    contexts: Sequence[Context],
    config: ModelConfig,
    learned: Mapping[str, Tensor],
    *,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> list[LinearFit]:
    """Reads the contexts again, and fits each layer's linear part to what its places evict.

    Args:
        model: the teacher, on `meta`.
        config: the network with its places.
        learned: the layers' priorities, by checkpoint name.
        on_layer: called with the number of layers that are done.

    Returns:
        What fits the layers that see everything.
    """
    fits: list[LinearFit] = []
    chosen = contexts[: NUM_FITTED + NUM_JUDGED]
    layers = teacher_layers(model, read, [context.token_ids for context in chosen])
    for layer, (attention, inputs) in enumerate(layers):
        if config.is_local(layer):
            deque(inputs, maxlen=0)
        else:
            prefix = f"{model.paths.attention_of(layer)}.linear.priority"
            scorer = (learned[f"{prefix}_weight"], learned[f"{prefix}_bias"])
            fits.append(_Layer(config, layer, scorer, output_weight(attention)).fit(inputs, chosen))
        on_layer(layer + 1)
    return fits


class _Layer:
    """One layer's places and metric."""

    def __init__(self, config: ModelConfig, layer: int, scorer: tuple[Tensor, Tensor], output: Tensor) -> None:
        anchors = config.layers[layer].anchors
        assert anchors is not None
        self.anchors: AnchorConfig = anchors
        self.sinks, self.scorer = config.layers[layer].sinks, scorer
        self.frequencies, self.groups = config.frequencies, config.num_kv_heads
        own = output.unflatten(1, (config.num_heads, -1))
        self.metric = torch.einsum("ehd,ehf->hdf", own, own).unflatten(0, (self.groups, -1))  # [G, R, d, d]

    def fit(self, inputs: Iterator[LayerInputs], contexts: Sequence[Context]) -> LinearFit:
        rows: dict[tuple[int, int, float], list[list[_Rows]]] = {}
        for number, (read, context) in enumerate(zip(inputs, contexts, strict=True)):
            for key, own in self._rows(read, context).items():
                rows.setdefault(key, [[], []])[number >= NUM_FITTED].append(own)
        heads = [self._head(group, rows) for group in range(self.groups)]
        log_decay, bias, weight, without, saved = zip(*heads, strict=True)
        return LinearFit(
            torch.tensor(log_decay), torch.cat(bias), torch.cat(weight), torch.stack(without), torch.stack(saved)
        )

    def _head(
        self, group: int, rows: Mapping[tuple[int, int, float], list[list[_Rows]]]
    ) -> tuple[float, Tensor, Tensor, Tensor, Tensor]:
        """Log decay, biases [R] and weights [R, d], and the held-out loss without the linear part and what it saves."""
        best: tuple[float, float, list[tuple[Tensor, Tensor]]] = (math.inf, HALF_LIVES[0], [])
        shared = self.metric.shape[1]
        for half_life in HALF_LIVES:
            fitted = [_Rows.joined(rows[group, r, half_life][0]) for r in range(shared)]
            solved = [_solve(own) for own in fitted]
            change = sum(float(own.change(*found)) for own, found in zip(fitted, solved, strict=True))
            if change < best[0]:
                best = (change, half_life, solved)
        _, half_life, solved = best
        judged = [_Rows.joined(rows[group, r, half_life][1] or rows[group, r, half_life][0]) for r in range(shared)]
        changes = torch.stack([own.change(*found) for own, found in zip(judged, solved, strict=True)])
        bias = torch.stack([found[1] for found in solved]).masked_fill(changes >= 0, -torch.inf)
        weight = torch.stack([found[0] for found in solved]).masked_fill((changes >= 0)[:, None], 0.0)
        without = torch.stack([own.without.sum() for own in judged]).sum()
        return -math.log(2) / half_life, bias.float(), weight.float(), without, -changes.clamp(max=0).sum()

    def _rows(self, read: LayerInputs, context: Context) -> dict[tuple[int, int, float], _Rows]:
        """Of one context, by key-value head, query head within it, and half-life."""
        length = len(read.x)
        first = self.sinks + max(self.anchors.windows)
        told = [row for fact in context.recalled for row in range(fact.answered[0] - 1, fact.answered[1] - 1)]
        everywhere = torch.arange(min(first, length - 1), length, ROW_STRIDE)
        rows = torch.cat([everywhere, torch.tensor([row for row in told if row >= first], dtype=torch.int64)])
        is_answer = torch.arange(len(rows)) >= len(everywhere)
        rotary = Rotary.at(torch.arange(length), frequencies=self.frequencies, dtype=torch.float32)
        queries = rotary.undo(read.q.flatten(1, 2)).view_as(read.q)[rows]
        probability = probabilities(read, rows, length)
        priority = priorities(functional.linear(read.x, *self.scorer), self.anchors)
        distance = (rows[:, None] - torch.arange(length)).clamp(min=0).float()
        found = {}
        for group in range(self.groups):
            lost = self._is_lost(priority[group], rows, group)
            own, value = probability[group], read.v[:, group]
            held = own * ~lost
            mass, near = held.sum(-1), held @ value / held.sum(-1, keepdim=True)
            error = near - own @ value  # [R, N, d]
            own_queries = [queries[:, group, r].double() for r in range(len(own))]
            for half_life in HALF_LIVES:
                decayed = lost * torch.exp2(-distance / half_life)  # [N, T]
                total = decayed.sum(-1).clamp(min=1e-12)
                step = decayed @ value / total[:, None] - near
                step = step * lost.any(-1)[:, None]
                moved = torch.einsum("rdf,rnf->rnd", self.metric[group], step)
                offset = (held.amax(-1) * total / mass).log()
                base = torch.einsum("rdf,rnd,rnf->rn", self.metric[group], error, error)
                energy = read.energy[rows]
                for r in range(len(own)):
                    found[group, r, half_life] = _Rows(
                        (base[r] / energy).double(),
                        ((error[r] * moved[r]).sum(-1) / energy).double(),
                        ((step[r] * moved[r]).sum(-1) / energy).double(),
                        offset[r].double(),
                        own_queries[r],
                        is_answer,
                    )
        return found

    def _is_lost(self, priority: Tensor, rows: Tensor, group: int) -> Tensor:
        """[N, T]: whether a token has been evicted when each of the rows asks."""
        token, window = torch.arange(len(priority)), self.anchors.windows[group]
        limit = self.anchors.places[group] - window - self.sinks
        rank = ranks(priority, sinks=self.sinks)[:, (rows - window).clamp(min=0)].T
        is_near = (rows[:, None] - token < window) | (token < self.sinks)
        return ~is_near & (rank >= limit)


def _solve(rows: _Rows) -> tuple[Tensor, Tensor]:
    """Weight [d] and bias of the mixing weight that make the squared error least."""
    size = rows.queries.shape[1]
    total = rows.h.sum().clamp(min=1e-12)
    mean = (rows.queries * rows.h[:, None]).sum(0) / total
    inputs = torch.cat([rows.queries - mean, torch.ones(len(rows.h), 1, dtype=torch.float64)], 1)
    penalty = PENALTY * (inputs.square() * rows.h[:, None]).sum(0)
    penalty[-1] = 0.0

    def loss(found: Tensor) -> Tensor:
        share = torch.sigmoid(rows.offset + inputs @ found)
        return (2 * rows.c * share + rows.h * share.square()).sum() + (penalty * found.square()).sum()

    found = torch.zeros(size + 1, dtype=torch.float64)
    biases = torch.arange(-12.0, LARGEST_LOGIT + 0.1, 0.5, dtype=torch.float64)
    shares = torch.sigmoid(rows.offset + biases[:, None])
    found[-1] = biases[(2 * rows.c * shares + rows.h * shares.square()).sum(1).argmin()]
    current = loss(found)
    for _ in range(ITERATIONS):
        share = torch.sigmoid(rows.offset + inputs @ found)
        slope = (share * (1 - share))[:, None] * inputs
        weighted = slope * rows.h[:, None]
        downhill = -slope.T @ (rows.c + rows.h * share) - penalty * found
        step = torch.linalg.solve(weighted.T @ slope + torch.diag(penalty + 1e-9 * total), downhill)
        tries = [(loss(found + scale * step), scale) for scale in (1.0, 0.5, 0.25, 0.125)]
        least, scale = min(tries, key=lambda one: float(one[0]))
        if not least < current:
            break
        found, current = found + scale * step, least
    return found[:-1], found[-1] - mean @ found[:-1]
