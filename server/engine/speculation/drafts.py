"""Speculative decoding: guesses of the next tokens, checked by the model many at a time. Standard library only.

A sequence's guesses (drafts) are what followed the longest earlier occurrence of its last tokens, in its own prompt and
output. One step feeds the last token and the drafts; every row is sampled exactly as it would be without drafts, and
as long as the sampled token is the draft, the next row holds too. So drafts change the speed, never the tokens.

How many drafts a step takes is a matter of its cost: as many as bring the most tokens for the cost of the step with
them (`cost_model` beside this). How likely they hold is counted for every sequence, from all of its tokens, drafted
or not: text that does not repeat itself gets no drafts, and goes on being watched for free.

A request may come with a prediction of its answer. Places in it are trusted more than others, until it proves wrong.
"""

from collections.abc import Sequence as Items

from server.engine.followers import StepCosts
from server.engine.speculation.index import MAX_MATCH, TokenHistory

_BUCKETS = tuple(max(0, length.bit_length() - 1) for length in range(MAX_MATCH + 1))
"""Of a match length: 1, 2-3, 4-7, 8-15, 16-31, 32."""
_PRIOR = (0.15, 0.35, 0.55, 0.7, 0.85, 0.9)
_PREDICTED_PRIOR = (0.6, 0.75, 0.85, 0.9, 0.95, 0.97)
_NUM_BUCKETS = len(_PRIOR)
_PRIOR_WEIGHT = 8.0
_DECAY = 0.98
_LEAST_CHANCE = 0.02
"""Of a draft that is still thought about."""


class OwnTextDrafter:
    """Guesses what followed earlier occurrences of a sequence's last tokens, and counts how such guesses have done.

    Attributes:
        last_token_id: the token that was pushed last, or the prompt's last one.
    """

    def __init__(self, history: TokenHistory, last_token_id: int, *, end_token_ids: frozenset[int]) -> None:
        """
        Args:
            history: of the prompt, and of the prediction if there is one; this drafter's own.
            last_token_id: of the prompt.
            end_token_ids: tokens that may end the sequence; nothing is guessed from them on.
        """
        self._history = history
        self._end_token_ids = end_token_ids
        self._held = [chance * _PRIOR_WEIGHT for chance in (*_PRIOR, *_PREDICTED_PRIOR)]
        self._seen = [_PRIOR_WEIGHT] * len(self._held)
        self.last_token_id = last_token_id

    @property
    def follows_prediction(self) -> bool:
        """Whether what it drafts now is from the prediction."""
        return self._history.is_predicted

    def push(self, token_id: int) -> None:
        """Takes a token of the output, and notes whether it was expected."""
        history = self._history
        if history.match_length:
            bucket = self._bucket(history.match_length)
            self._seen[bucket] = _DECAY * self._seen[bucket] + 1
            self._held[bucket] = _DECAY * self._held[bucket] + (history.expected == token_id)
        history.push(token_id)
        self.last_token_id = token_id

    def draft(self, most: int, *, costs: StepCosts, num_rows: int) -> tuple[int, ...]:
        """As many tokens that may come next as bring the most for what their step costs.

        Args:
            most: no more than so many.
            costs: of steps by their rows.
            num_rows: of the step without them, >= 1.
        """
        length = self._history.match_length
        if length == 0:
            return ()
        chance, num_tokens = 1.0, float(num_rows)
        best, num_best = num_tokens / costs.step(num_rows), 0
        drafts = self._history.continuation(most)
        for number, token_id in enumerate(drafts, start=1):
            chance *= self._chance(length)
            if chance < _LEAST_CHANCE or token_id in self._end_token_ids:
                break
            num_tokens += chance
            rate = num_tokens / costs.step(num_rows + number)
            if rate >= best:
                best, num_best = rate, number
            length = min(length + 1, MAX_MATCH)
        return tuple(drafts[:num_best])

    def _bucket(self, match_length: int) -> int:
        return _BUCKETS[match_length] + (_NUM_BUCKETS if self._history.is_predicted else 0)

    def _chance(self, match_length: int) -> float:
        """How often the token behind a match of this length was the one that came."""
        bucket = self._bucket(match_length)
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
