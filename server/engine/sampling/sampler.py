"""From logits to tokens, for all rows of a step together, each row by its own parameters.

Order, as in the field: logit bias, penalties, suppression (until `min_tokens`, of bad words), what alone is permitted;
then, for rows that are not greedy, temperature, min-p, top-k, top-p, typical-p, each over what the one before left.
Tokens of equal weight are kept or dropped together. A token is drawn by inverse CDF, in vocabulary order, from one
uniform number that depends on the seed and the output index alone: no row ever depends on another. Work that no row
asks for is not done; a greedy step is an argmax.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Items
from ctypes import CDLL
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from dijiang_model.native.choose import NOT_FINITE, greedy_tokens
from dijiang_model.native.draw import sampled_tokens
from dijiang_model.native.library import load_library
from dijiang_model.native.structures import DrawRules
from dijiang_model.ops.drawing import Draws
from dijiang_model.ops.selection import drawn_tokens
from server.engine.sampling.forbidden import bad_continuations
from server.engine.sampling.grammar_masks import MaskPlan, apply_masks, prepare_masks
from server.engine.sampling.penalties import PenaltyPlan, PenaltyTables
from server.engine.sampling.randomness import uniform
from server.engine.sequence import Chunk, Sequence
from server.engine.transfer import Field, Transfer, TransferredFields
from server.engine.types.requests import SamplingParams

FAULTY = NOT_FINITE
"""In the place of a token: the row's logits were not finite."""

# Any temperature is exact within these; beyond, fp32 has the same limits: greedy, and uniform.
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-30, 1e30
_MAX_LOGIT_BIAS = 1e30
KEEP_ALL_MASS = 2.0


@dataclass(frozen=True, slots=True)
class BiasPlan:
    """Additions to logits, [B] each: rows and tokens int64, values float64."""

    rows: Field
    token_ids: Field
    values: Field


@dataclass(frozen=True, slots=True)
class SuppressionPlan:
    """Tokens that a row may not sample, [B] each, int64."""

    rows: Field
    token_ids: Field


@dataclass(frozen=True, slots=True)
class DrawPlan:
    """The M rows that are not greedy.

    Attributes:
        rows: [M] int64, rows of the logits; None: all of them.
        uniforms, temperatures: [M] float64.
        min_p: None: no row uses it; else [M] float64, 0 where it is off.
        top_k: None: no row uses it; else [M] int64, the vocabulary's size where it is off.
        max_top_k: the largest k in use.
        top_p: None: no row uses it; else [M] float64, `KEEP_ALL_MASS` where it is off.
        typical_p: the same.
    """

    rows: Field | None
    uniforms: Field
    temperatures: Field
    min_p: Field | None
    top_k: Field | None
    max_top_k: int
    top_p: Field | None
    typical_p: Field | None

    def draws(self, arrived: TransferredFields) -> Draws:
        """The same on the device."""

        def numbers(field: Field | None) -> Tensor | None:
            return None if field is None else arrived[field]

        return Draws(
            uniforms=arrived[self.uniforms],
            temperatures=arrived[self.temperatures],
            min_p=numbers(self.min_p),
            top_k=numbers(self.top_k),
            max_top_k=self.max_top_k,
            top_p=numbers(self.top_p),
            typical_p=numbers(self.typical_p),
        )


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How a step's rows are sampled; None stands for work that no row asks for."""

    penalties: PenaltyPlan | None
    bias: BiasPlan | None
    suppression: SuppressionPlan | None
    masks: MaskPlan | None
    draw: DrawPlan | None

    @property
    def is_greedy(self) -> bool:
        """Whether every row is greedy and wants nothing else."""
        changes = (self.penalties, self.bias, self.suppression, self.masks, self.draw)
        return all(plan is None for plan in changes)


class Sampler:
    """Samples steps; remembers between them only the tokens of penalised sequences."""

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        self.vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._penalties = PenaltyTables(vocab_size, device)
        self._library = load_library() if device.type == "cpu" else None

    def prepare(self, chunks: Items[Chunk], transfer: Transfer) -> SamplingPlan:
        """Host side: plans the sampling of a step's chunks, in the order of its logits, into a transfer."""
        return SamplingPlan(
            penalties=self._penalties.prepare(chunks, transfer),
            bias=_bias_plan(chunks, transfer),
            suppression=self._suppression_plan(chunks, transfer),
            masks=prepare_masks(chunks, self.vocab_size, transfer),
            draw=self._draw_plan(chunks, transfer),
        )

    def sample(self, logits: Tensor, plan: SamplingPlan, arrived: TransferredFields) -> Tensor:
        """Device side: one token for each row, nothing read back.

        Args:
            logits: [R, vocab] fp32; overwritten.
            plan: of these rows.
            arrived: the transfer that the plan was prepared into.

        Returns:
            [R] int64 token ids; `FAULTY` where a row's logits are not all finite.
        """
        library = self._library if logits.dtype == torch.float32 else None
        if library is not None:
            greedy = greedy_tokens(logits, library)
            if plan.is_greedy:
                return greedy
            is_finite = greedy != FAULTY
        else:
            is_finite = torch.isfinite(logits.sum(dim=-1))  # one pass; NaN and infinities carry through a sum
        if plan.bias is not None:
            index = (arrived[plan.bias.rows], arrived[plan.bias.token_ids])
            logits.index_put_(index, arrived[plan.bias.values].float(), accumulate=True)
        if plan.penalties is not None:
            self._penalties.apply(logits, plan.penalties, arrived)
        if plan.suppression is not None:
            # Not -inf: a row with every token suppressed stays well defined.
            index = (arrived[plan.suppression.rows], arrived[plan.suppression.token_ids])
            logits.index_put_(index, torch.full_like(index[0], torch.finfo(logits.dtype).min, dtype=logits.dtype))
        if plan.masks is not None:
            apply_masks(logits, plan.masks, arrived)
        token_ids = _choose(logits, plan.draw, arrived, library)
        if plan.penalties is not None:
            self._penalties.count(token_ids, plan.penalties, arrived)
        return torch.where(is_finite, token_ids, FAULTY)

    def release(self, sequence: Sequence) -> None:
        """Forgets an ended sequence."""
        self._penalties.release(sequence)

    def _suppression_plan(self, chunks: Items[Chunk], transfer: Transfer) -> SuppressionPlan | None:
        pairs = [(row, token_id) for row, chunk in enumerate(chunks) for token_id in self._suppressed(chunk)]
        if not pairs:
            return None
        rows, token_ids = zip(*pairs, strict=True)
        return SuppressionPlan(transfer.integers(rows), transfer.integers(token_ids))

    def _suppressed(self, chunk: Chunk) -> tuple[int, ...]:
        """Tokens that come only if nothing else may."""
        sampling, bad = chunk.sequence.sampling, bad_continuations(chunk)
        if chunk.output_index is not None and chunk.output_index < sampling.min_tokens:
            return (*self._eos_token_ids, *sampling.stop_token_ids, *bad)
        # A grammar permits the end where a text is complete; without one, `ignore_eos` lets the token through.
        return (*self._eos_token_ids, *bad) if sampling.ignore_eos and chunk.sequence.constraint is not None else bad

    def _draw_plan(self, chunks: Items[Chunk], transfer: Transfer) -> DrawPlan | None:
        rows = [row for row, chunk in enumerate(chunks) if chunk.sequence.sampling.temperature > 0]
        if not rows:
            return None
        params = [chunks[row].sequence.sampling for row in rows]
        top_k = [_effective_top_k(sampling, self.vocab_size) for sampling in params]
        in_use = [k for k in top_k if k < self.vocab_size]
        return DrawPlan(
            rows=transfer.integers(rows) if len(rows) < len(chunks) else None,
            uniforms=transfer.reals(uniform_of(chunks[row]) for row in rows),
            temperatures=transfer.reals(clamped_temperature(sampling.temperature) for sampling in params),
            min_p=_unless_off([p.min_p for p in params], 0.0, transfer),
            top_k=transfer.integers(top_k) if in_use else None,
            max_top_k=max(in_use, default=0),
            top_p=_unless_off([_mass(p.top_p) for p in params], KEEP_ALL_MASS, transfer),
            typical_p=_unless_off([_mass(p.typical_p) for p in params], KEEP_ALL_MASS, transfer),
        )


def _bias_plan(chunks: Items[Chunk], transfer: Transfer) -> BiasPlan | None:
    triples = [
        (row, token_id, min(max(value, -_MAX_LOGIT_BIAS), _MAX_LOGIT_BIAS))
        for row, chunk in enumerate(chunks)
        for token_id, value in chunk.sequence.sampling.logit_bias
    ]
    if not triples:
        return None
    rows, token_ids, values = zip(*triples, strict=True)
    return BiasPlan(transfer.integers(rows), transfer.integers(token_ids), transfer.reals(values))


def clamped_temperature(temperature: float) -> float:
    """A temperature > 0 that fp32 can divide by."""
    return min(max(temperature, _MIN_TEMPERATURE), _MAX_TEMPERATURE)


def draw_rules(sampling: SamplingParams, vocab_size: int) -> DrawRules:
    """How the kernels draw a request's tokens, but for the random number of each; temperature 0 where it is greedy."""
    return DrawRules(
        temperature=clamped_temperature(sampling.temperature) if sampling.temperature > 0 else 0.0,
        min_p=sampling.min_p,
        top_k=_effective_top_k(sampling, vocab_size),
        top_p=_mass(sampling.top_p),
    )


def uniform_of(chunk: Chunk) -> float:
    """The random number of the token that a chunk's row samples."""
    assert chunk.output_index is not None
    return uniform(chunk.sequence.sampling.seed, chunk.output_index)


def _effective_top_k(sampling: SamplingParams, vocab_size: int) -> int:
    return sampling.top_k if 0 < sampling.top_k < vocab_size else vocab_size


def _mass(top_p: float) -> float:
    return top_p if top_p < 1 else KEEP_ALL_MASS


def _unless_off(values: Items[float], off: float, transfer: Transfer) -> Field | None:
    return None if all(value == off for value in values) else transfer.reals(values)


def _choose(logits: Tensor, plan: DrawPlan | None, arrived: TransferredFields, library: CDLL | None) -> Tensor:
    """[R, vocab] -> [R] int64: the most likely token, or a sampled one for the rows of the plan."""
    if plan is None:
        return logits.argmax(dim=-1)
    if library is None or plan.typical_p is not None:
        drawn = partial(draw, plan=plan, arrived=arrived)
    else:
        rules = _draw_rules(plan, arrived, logits.shape[-1])
        drawn = partial(sampled_tokens, rules=rules, library=library)
    if plan.rows is None:
        return drawn(logits)
    token_ids, rows = logits.argmax(dim=-1), arrived[plan.rows]
    token_ids[rows] = drawn(logits[rows])
    return token_ids


def _draw_rules(plan: DrawPlan, arrived: TransferredFields, vocab_size: int) -> list[DrawRules]:
    """Of each of the plan's rows."""

    def column(field: Field | None, off: float) -> Iterable[float]:
        return repeat(off) if field is None else arrived[field].tolist()

    return [
        DrawRules(*rules)
        for rules in zip(
            arrived[plan.uniforms].tolist(),
            arrived[plan.temperatures].tolist(),
            column(plan.min_p, 0.0),
            column(plan.top_k, vocab_size),
            column(plan.top_p, KEEP_ALL_MASS),
            strict=False,
        )
    ]


def draw(logits: Tensor, plan: DrawPlan, arrived: TransferredFields) -> Tensor:
    """[M, vocab] fp32 -> [M] int64, by inverse CDF over the tokens that the filters leave."""
    return drawn_tokens(logits, plan.draws(arrived))
