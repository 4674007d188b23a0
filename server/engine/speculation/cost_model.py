"""What a step costs by its rows: known beforehand roughly, measured while the engine runs. Standard library only.

Multiplying goes by tiles of rows, so costs rise in stairs: with unrounded weights eight rows may be cheaper than six.
Where the stairs are, and how high, depends on weights, CPU and threads; so each step that reads no prompt is
timed, and tells what so many rows cost. Row counts that were not seen lately follow the shape known beforehand, at the
height of those near them that were.
"""

from collections.abc import Mapping

MAX_ROWS = 64
"""Larger steps go on from there in a straight line."""
_MEMORY = 0.9
"""What a row count's earlier steps weigh when it is seen again: the last ten or so count."""
_FORGETTING = 0.995
"""Of the trust in row counts that are not seen, for each step."""
_LARGEST_SURPRISE = 2.0


class StepCosts:
    """Costs of steps by their number of rows; only their ratios mean anything."""

    def __init__(self, known: Mapping[int, float]) -> None:
        """
        Args:
            known: cost by rows, of one row at least; between these in straight lines, and beyond the last one too.
        """
        self._prior = [_between(known, max(1, rows)) for rows in range(MAX_ROWS + 1)]
        self._means: dict[int, float] = {}
        self._weights: dict[int, float] = {}
        self._costs: dict[int, float] = dict(enumerate(self._prior))

    def step(self, num_rows: int) -> float:
        """Cost of a step of `num_rows` >= 1."""
        if num_rows > MAX_ROWS:
            most = self.step(MAX_ROWS)
            rise = max(0.0, most - self.step(MAX_ROWS // 2))
            return most + (num_rows - MAX_ROWS) * rise / (MAX_ROWS - MAX_ROWS // 2)
        if num_rows not in self._costs:
            self._costs[num_rows] = self._estimated(num_rows)
        return self._costs[num_rows]

    def observe(self, num_rows: int, seconds: float) -> None:
        """Takes the time of a step in; one that a busy machine held up counts no more than twice what was expected."""
        if num_rows > MAX_ROWS:
            return
        if self._means:
            seconds = min(seconds, _LARGEST_SURPRISE * self.step(num_rows))
        for rows in self._weights:
            self._weights[rows] *= _FORGETTING
        weight = _MEMORY * self._weights.get(num_rows, 0.0)
        self._means[num_rows] = (weight * self._means.get(num_rows, 0.0) + seconds) / (weight + 1.0)
        self._weights[num_rows] = weight + 1.0
        self._costs = {}

    def _estimated(self, rows: int) -> float:
        """What is known beforehand, times what was measured over it: of the same rows, and less so of others near."""
        weights = {seen: weight / (1 + (seen - rows) ** 2) for seen, weight in self._weights.items()}
        ratio = sum(weight * self._means[seen] / self._prior[seen] for seen, weight in weights.items())
        return self._prior[rows] * ratio / sum(weights.values())


def _between(known: Mapping[int, float], rows: int) -> float:
    """On the straight lines through what is known."""
    if rows in known or len(known) == 1:
        return known.get(rows, known[1])
    places = sorted(known)
    right = next((place for place in places if place > rows), places[-1])
    left = places[places.index(right) - 1]
    return known[left] + (known[right] - known[left]) * (rows - left) / (right - left)
