"""Who gets drafts of its next tokens in a step, and how many. Standard library only."""

from server.engine.sequence import Sequence
from server.engine.speculation_drafts import Drafter, RowPrice

DEFAULT_MAX_DRAFTS = 8
FLOAT_PRICE = RowPrice(second=0.11, further=0.13, beyond=0.24)
QUANTIZED_PRICE = RowPrice(second=0.13, further=0.18, beyond=0.2)
"""Measured with the compiled kernels; see `docs/speculation.md`. Steps of codes read less, so their rows weigh more."""


def speculation_of(max_drafts: int | None, *, can_hold: bool, is_quantized: bool) -> "Speculation | None":
    """How an engine speculates; None: not at all.

    Args:
        max_drafts: what the operator asks for, 0 for none; None: what is good.
        can_hold: whether the model can verify drafts so that no token changes.
        is_quantized: whether its weights are codes.

    Raises:
        ValueError: drafts are asked for, and the model cannot verify them.
    """
    if max_drafts == 0 or (max_drafts is None and not can_hold):
        return None
    if not can_hold:
        raise ValueError(
            f"speculate is {max_drafts}, but drafts are verified by the compiled CPU kernels in one process alone: "
            "elsewhere a step of several tokens rounds otherwise than single steps do, and answers would change"
        )
    wanted = DEFAULT_MAX_DRAFTS if max_drafts is None else max_drafts
    return Speculation(wanted, QUANTIZED_PRICE if is_quantized else FLOAT_PRICE)


class Speculation:
    """The rules of an engine.

    Attributes:
        max_drafts: most drafts of one sequence in a step.
    """

    def __init__(self, max_drafts: int, price: RowPrice) -> None:
        """
        Args:
            max_drafts: most drafts of one sequence in a step, >= 1.
            price: of the rows that drafts take.
        """
        self.max_drafts = max_drafts
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
        most = min(most, self.max_drafts) if limit is None else min(most, self.max_drafts, limit)
        if sequence.drafter is None or most < 1:
            return ()
        drafts = self._guess(sequence, sequence.drafter, most, num_rows=num_rows)
        if drafts and sequence.constraint is not None:
            drafts = drafts[: sequence.constraint.num_permitted(drafts)]
        return drafts

    def _guess(self, sequence: Sequence, drafter: Drafter, most: int, *, num_rows: int) -> tuple[int, ...]:
        """Up to `most` drafts; whether a grammar permits them is seen to."""
        return drafter.draft(most, price=self._price, num_rows=num_rows)
