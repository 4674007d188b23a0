"""How the prompt tokens of a step are shared among the prompts that are being read. Standard library only.

Among tenants by weight, counted over time: who has had least for its weight is next, a piece of `PIECE` tokens after
the other, so that no share is lost in steps of few tokens; who was away does not save turns up. Among the prompts of
one tenant half goes to the oldest, which so never stops; the rest to those with the least left, which are soon done:
a short prompt beside a long one has its first token within a few steps.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from server.engine.sequence import Chunk, Sequence, SequenceStatus
from server.engine.types.requests import Tenant

PIECE = 16


class PromptShares:
    """What tenants have had, for their weight."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}

    def split(self, prompts: list[Sequence], num_tokens: int) -> list[tuple[Sequence, int]]:
        """Prompts that are read in a step of so many tokens, in the order given, each with its tokens (>= 1)."""
        if len(prompts) == 1:
            return [(prompts[0], num_tokens)] if num_tokens > 0 else []
        tenants: dict[str, list[Sequence]] = {}
        for prompt in prompts:
            tenants.setdefault(prompt.tenant.name, []).append(prompt)
        shares = dict.fromkeys(tenants, num_tokens) if len(tenants) == 1 else self._among(tenants, num_tokens)
        given: dict[Sequence, int] = {}
        for name, ones in tenants.items():
            given |= split_among(ones, shares[name])
        return [(prompt, given[prompt]) for prompt in prompts if given.get(prompt, 0) > 0]

    def _among(self, tenants: dict[str, list[Sequence]], num_tokens: int) -> dict[str, int]:
        """Tokens by tenant."""
        least = min(self._served.get(name, 0.0) for name in tenants) if self._served else 0.0
        served = {name: max(self._served.get(name, 0.0), least) for name in tenants}
        wanted = {name: sum(one.num_chunk_left for one in ones) for name, ones in tenants.items()}
        weights = {name: ones[0].tenant.weight for name, ones in tenants.items()}
        shares = dict.fromkeys(tenants, 0)
        while num_tokens > 0 and (open_ := [name for name in tenants if wanted[name] > shares[name]]):
            name = min(open_, key=served.__getitem__)
            piece = min(PIECE, num_tokens, wanted[name] - shares[name])
            shares[name] += piece
            served[name] += piece / weights[name]
            num_tokens -= piece
        lowest = min(served.values())
        self._served = {name: value - lowest for name, value in served.items()}
        return shares


def split_among(prompts: list[Sequence], num_tokens: int) -> dict[Sequence, int]:
    """One tenant's prompts, of which all want at least one token, and what each gets."""
    oldest = min(prompts, key=lambda one: one.arrival)
    given = {oldest: min(oldest.num_chunk_left, (num_tokens + 1) // 2)}
    left = num_tokens - given[oldest]
    for prompt in sorted((one for one in prompts if one is not oldest), key=lambda one: one.num_prompt_left):
        given[prompt] = min(prompt.num_chunk_left, left)
        left -= given[prompt]
    given[oldest] += min(left, oldest.num_chunk_left - given[oldest])
    return given


def until_first_token(prompts: list[Sequence], num_tokens: int) -> int:
    """Of so many tokens of a step, how many are read: half, if a prompt ends in it that is a small part of them.

    Its first token comes with the end of the step, and need not wait for what others can read in the next one.
    """
    shortest = min(one.num_prompt_left for one in prompts)
    is_small = len(prompts) > 1 and 2 * shortest * len(prompts) <= num_tokens
    return num_tokens // 2 if is_small else num_tokens


class Reading:
    """Whether one tenant is to read one more prompt in a step: not so many that none gets on, nor begun too early.

    A prompt that waits until those before it are read begins behind what they leave in the prefix cache.
    """

    def __init__(self, running: Iterable[Sequence], tenant: Tenant, num_tokens: int) -> None:
        """
        Args:
            running: sequences with slots.
            tenant: whose prompts count.
            num_tokens: of the step.
        """
        mine = [one for one in running if one.status is SequenceStatus.PREFILL and one.tenant.name == tenant.name]
        self._half = (num_tokens + 1) // 2
        self._num_tokens = num_tokens
        oldest = min((one.arrival for one in mine), default=-1)
        self._claimed = sum(
            min(one.num_prompt_left, self._half if one.arrival == oldest else num_tokens) for one in mine
        )
        self._of_short = sum(one.num_prompt_left for one in mine if self._is_short(one) and one.arrival != oldest)

    def wants(self, sequence: Sequence) -> bool:
        """Whether this prompt is to be begun beside the others."""
        return self._claimed < self._num_tokens or (self._is_short(sequence) and self._of_short < self._half)

    def _is_short(self, sequence: Sequence) -> bool:
        return sequence.num_prompt_left <= SHORT


SHORT = 512
"""Tokens of a prompt that need not wait for longer ones that came before."""


@dataclass(slots=True)
class StepBudget:
    """What is left of a step while it is planned: tokens, and prompt tokens among them that may be scored."""

    num_tokens: int
    num_scored_tokens: int

    def feed(self, sequence: Sequence, most: int) -> list[Chunk]:
        """The next chunk of a prompt, of up to `most` tokens; none if nothing is left for it."""
        most = min(most, self.num_tokens)
        if sequence.scores_prompt:
            most = min(most, self.num_scored_tokens)
        if most < 1:
            return []
        chunk = sequence.next_chunk(most)
        self.num_tokens -= chunk.length
        self.num_scored_tokens -= chunk.num_scored
        return [chunk]
