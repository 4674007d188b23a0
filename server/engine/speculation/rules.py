"""Who gets drafts of its next tokens in a step, and how many. Standard library only."""

from server.engine.followers import Drafter
from server.engine.sequence import Sequence
from server.engine.speculation.cost_model import StepCosts
from server.engine.speculation.drafts import OwnTextDrafter
from server.engine.speculation.index import TokenHistory
from server.engine.types.requests import GenerationRequest

DEFAULT_MAX_DRAFTS = 15
FLOAT_COSTS = {1: 1.0, 2: 1.15, 4: 1.4, 8: 1.5, 16: 2.3, 32: 3.7}
QUANTIZED_COSTS = {1: 1.0, 2: 1.3, 4: 1.45, 8: 2.4, 16: 4.2, 32: 7.2}
"""Measured with the compiled kernels, on the lower side, so that what is cheaper on another machine is tried there.
Steps of codes read less, so their rows weigh more."""


def speculation_of(max_drafts: int | None, *, can_defer: bool, is_quantized: bool) -> "Speculation | None":
    """How an engine speculates; None: not at all.

    Args:
        max_drafts: what the operator asks for, 0 for none; None: what is good.
        can_defer: whether the model can verify drafts so that no token changes.
        is_quantized: whether its weights are codes.

    Raises:
        ValueError: drafts are asked for, and the model cannot verify them.
    """
    if max_drafts == 0 or (max_drafts is None and not can_defer):
        return None
    if not can_defer:
        raise ValueError(
            f"speculate is {max_drafts}, but drafts are verified by the compiled CPU kernels in one process alone: "
            "elsewhere a step of several tokens rounds otherwise than single steps do, and answers would change"
        )
    wanted = DEFAULT_MAX_DRAFTS if max_drafts is None else max_drafts
    return Speculation(wanted, StepCosts(QUANTIZED_COSTS if is_quantized else FLOAT_COSTS))


class Speculation:
    """The rules of an engine.

    Attributes:
        max_drafts: most drafts of one sequence in a step.
    """

    def __init__(self, max_drafts: int, costs: StepCosts) -> None:
        """
        Args:
            max_drafts: most drafts of one sequence in a step, >= 1.
            costs: of steps by their rows; learns from `observe`.
        """
        self.max_drafts = max_drafts
        self._costs = costs
        self._of_group: tuple[GenerationRequest, TokenHistory] | None = None

    def begin(self, sequence: Sequence) -> None:
        """Lets an admitted sequence have drafts, unless it ends before they could be of use."""
        limit = sequence.sampling.max_tokens
        if limit is None or limit > 2:
            last = sequence.request.prompt_token_ids[-1]
            sequence.drafter = OwnTextDrafter(self._history(sequence), last, end_token_ids=sequence.end_token_ids)

    def observe(self, num_rows: int, seconds: float) -> None:
        """Learns what a step of so many rows took that read no prompt."""
        self._costs.observe(num_rows, seconds)

    def _history(self, sequence: Sequence) -> TokenHistory:
        """Of prompt and prediction; built once for the requests of a group, which come one after the other."""
        request = sequence.request
        if self._of_group is not None and _same_texts(self._of_group[0], request):
            return self._of_group[1].copy()
        history = TokenHistory(request.prompt_token_ids, prediction=request.predicted_token_ids)
        self._of_group = None if request.group is None else (request, history.copy())
        return history

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
        return drafter.draft(most, costs=self._costs, num_rows=num_rows)


def _same_texts(request: GenerationRequest, other: GenerationRequest) -> bool:
    if request.group is None or request.group != other.group:
        return False
    return (request.prompt_token_ids, request.predicted_token_ids) == (
        other.prompt_token_ids,
        other.predicted_token_ids,
    )
