"""Speculative decoding: guesses of the next tokens, checked by the model many at a time. Standard library only.

A sequence's guesses (drafts) are what followed the longest earlier occurrence of its last tokens, in its own prompt and
output. One step feeds the last token and the drafts; every row is sampled exactly as it would be without drafts, and
as long as the sampled token is the draft, the next row holds too. So drafts change the speed, never the tokens.

How many drafts a step takes is a matter of their price: a row more costs a share of a step, and is worth it while the
chance that it holds is higher than what that share would earn otherwise. The chance is counted for every sequence, from
all of its tokens, drafted or not: text that does not repeat itself gets no drafts, and goes on being watched for free.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

from server.engine.speculation_index import MAX_MATCH, TokenHistory

_BUCKETS = tuple(max(0, length.bit_length() - 1) for length in range(MAX_MATCH + 1))
"""Of a match length: 1, 2-3, 4-7, 8-15, 16-31, 32."""
_PRIOR = (0.15, 0.35, 0.55, 0.7, 0.85, 0.9)
_PRIOR_WEIGHT = 8.0
_DECAY = 0.98
FEW_ROWS = 8


@dataclass(frozen=True, slots=True)
class RowPrice:
    """What a row more costs a step, as a share of a step of one row.

    Attributes:
        second: of the second row.
        further: of each one behind it, up to `FEW_ROWS`.
        beyond: of each one behind those, where multiplying takes longer than reading the weights.
    """

    second: float
    further: float
    beyond: float

    def step(self, num_rows: int) -> float:
        """Cost of a step of `num_rows` >= 1."""
        num_further = min(max(num_rows - 2, 0), FEW_ROWS - 2)
        cost = 1.0 + self.further * num_further + self.beyond * max(num_rows - FEW_ROWS, 0)
        return cost if num_rows == 1 else cost + self.second

    def least_chance(self, *, num_rows: int, num_tokens: float) -> float:
        """How likely a draft must hold to be worth a row.

        Args:
            num_rows: of the step without it.
            num_tokens: that this step brings.
        """
        return (self.step(num_rows + 1) / self.step(num_rows) - 1) * num_tokens


class Drafter:
    """The guesses of one sequence, and how they have done."""

    def __init__(self, tokens: Items[int], *, end_token_ids: frozenset[int]) -> None:
        """
        Args:
            tokens: of the prompt.
            end_token_ids: tokens that may end the sequence; nothing is guessed from them on.
        """
        self._history = TokenHistory(tokens)
        self._end_token_ids = end_token_ids
        self._held = [chance * _PRIOR_WEIGHT for chance in _PRIOR]
        self._seen = [_PRIOR_WEIGHT] * len(_PRIOR)

    @property
    def last_token_id(self) -> int:
        """The token that was pushed last, or the prompt's last one."""
        return self._history.tokens[-1]

    def push(self, token_id: int) -> None:
        """Takes a token of the output, and notes whether it was expected."""
        history = self._history
        if history.match_length:
            bucket = _BUCKETS[history.match_length]
            self._seen[bucket] = _DECAY * self._seen[bucket] + 1
            self._held[bucket] = _DECAY * self._held[bucket] + (history.expected == token_id)
        history.push(token_id)

    def draft(self, most: int, *, price: RowPrice, num_rows: int) -> tuple[int, ...]:
        """Tokens that are likely enough to come next.

        Args:
            most: no more than so many.
            price: of the rows that they take.
            num_rows: of the step without them, >= 1.
        """
        length = self._history.match_length
        if length == 0:
            return ()
        chance, num_tokens = 1.0, float(num_rows)
        drafts: list[int] = []
        for token_id in self._history.continuation(most):
            chance *= self._chance(length)
            wanted = price.least_chance(num_rows=num_rows + len(drafts), num_tokens=num_tokens)
            if chance < wanted or token_id in self._end_token_ids:
                break
            drafts.append(token_id)
            num_tokens += chance
            length = min(length + 1, MAX_MATCH)
        return tuple(drafts)

    def _chance(self, match_length: int) -> float:
        """How often the token behind a match of this length was the one that came."""
        bucket = _BUCKETS[match_length]
        return self._held[bucket] / self._seen[bucket]


def num_confirmed(drafts: Items[int], token_ids: Items[int], faults: Items[bool]) -> int:
    """How many of a chunk's sampled tokens stand, at least 1.

    Args:
        drafts: K tokens.
        token_ids: K + 1, sampled behind the last token and behind each draft.
        faults: of those, whether the logits were not finite.
    """
    count = 1
    while count <= len(drafts) and not faults[count - 1] and token_ids[count - 1] == drafts[count - 1]:
        count += 1
    # A faulty row behind good ones is left to the next step, which finds it alone, as it would be without drafts.
    return count - 1 if count > 1 and faults[count - 1] else count
