"""What follows a sequence token by token: its grammar, and who guesses its next tokens. Standard library only."""

from array import array
from typing import Protocol


class Constraint(Protocol):
    """What the output of a sequence must look like; follows it token by token."""

    has_ended: bool
    """The end-of-sequence token was accepted."""

    def accept(self, token_id: int) -> str | None:
        """Takes a sampled token in; a sentence if the output cannot go on with it."""
        ...

    def num_permitted(self, token_ids: tuple[int, ...]) -> int:
        """How many of these tokens may come next, one after the other."""
        ...

    def write_mask(self, words: "array[int]", start: int, *, after: tuple[int, ...] = ()) -> None:
        """Writes a bit for each token, 1 where it may come after these tokens, into 8-byte words from words[start] on.

        `after` is permitted; it is not accepted by this.
        """
        ...


class StepCosts(Protocol):
    """What steps cost, in units of a step of one row."""

    def step(self, num_rows: int) -> float:
        """Returns the cost of a step of `num_rows` rows, >= 1."""
        ...


class Drafter(Protocol):
    """Guesses the next tokens of one sequence."""

    last_token_id: int
    """The token that was pushed last, or the prompt's last one."""

    @property
    def follows_prediction(self) -> bool:
        """Whether what it drafts now is from the request's prediction."""
        ...

    def push(self, token_id: int) -> None:
        """Takes a token of the output in."""
        ...

    def draft(self, most: int, *, costs: StepCosts, num_rows: int) -> tuple[int, ...]:
        """Returns up to `most` tokens that may come next and are worth their rows in a step of `num_rows`."""
        ...
