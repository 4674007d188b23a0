"""Who waits for a slot: by priority, then by arrival. Standard library only."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from server.engine.sequence import Sequence

_Place = tuple[int, int]


class WaitingQueue:
    """Sequences in the order in which they are to run."""

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}
        self._ordered: list[tuple[_Place, Sequence]] = []
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._ordered)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._places

    def __iter__(self) -> Iterator[Sequence]:
        """The sequences, the next one first; the queue may change meanwhile."""
        return iter([sequence for _, sequence in self._ordered])

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence behind those of its priority; lower numbers come first."""
        place = (sequence.request.priority, self._num_added)
        self._num_added += 1
        self._places[sequence.request_id] = place
        insort(self._ordered, (place, sequence), key=_place_of)

    def remove(self, request_id: str) -> Sequence | None:
        """Takes a sequence out; None if it is not there."""
        place = self._places.pop(request_id, None)
        if place is None:
            return None
        _, sequence = self._ordered.pop(bisect_left(self._ordered, place, key=_place_of))
        return sequence


def _place_of(entry: tuple[_Place, Sequence]) -> _Place:
    return entry[0]
