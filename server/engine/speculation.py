"""Who gets drafts of its next tokens in a step, and how many. Standard library only."""

from server.engine.sequence import Sequence
from server.engine.speculation_drafts import Drafter, RowPrice


class Speculation:
    """The rules of an engine."""

    def __init__(self, max_drafts: int, price: RowPrice) -> None:
        """
        Args:
            max_drafts: most drafts of one sequence in a step, >= 1.
            price: of the rows that drafts take.
        """
        self._max_drafts = max_drafts
        self._price = price

    def begin(self, sequence: Sequence) -> None:
        """Lets an admitted sequence have drafts, unless it ends before they could be of use."""
        limit = sequence.sampling.max_tokens
        if limit is None or limit > 2:
            sequence.drafter = Drafter(sequence.request.prompt_token_ids, end_token_ids=sequence.end_token_ids)

    def draft(self, sequence: Sequence, *, num_rows: int, most: int) -> tuple[int, ...]:
        """What a sequence that decodes is to verify in this step.

        Args:
            sequence: whose last token may still be under way; then there is nothing to go on from.
            num_rows: of the step, one for this sequence among them.
            most: rows that the step has left.
        """
        limit = sequence.max_drafts
        most = min(most, self._max_drafts) if limit is None else min(most, self._max_drafts, limit)
        if sequence.drafter is None or most < 1:
            return ()
        drafts = self._guess(sequence, sequence.drafter, most, num_rows=num_rows)
        if drafts and sequence.constraint is not None:
            drafts = drafts[: sequence.constraint.num_permitted(drafts)]
        return drafts

    def _guess(self, sequence: Sequence, drafter: Drafter, most: int, *, num_rows: int) -> tuple[int, ...]:
        """Up to `most` drafts; whether a grammar permits them is seen to."""
        return drafter.draft(most, price=self._price, num_rows=num_rows)
