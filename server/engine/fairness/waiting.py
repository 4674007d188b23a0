"""Who waits for a slot: by tenant, and among one tenant's by priority, then by arrival. Standard library only."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.engine.sequence import Sequence
from server.engine.types.requests import Tenant

_Place = tuple[int, int]


@dataclass(slots=True)
class _Line:
    """One tenant's sequences in their order, with their places."""

    tenant: Tenant
    ordered: list[tuple[_Place, Sequence]] = field(default_factory=list)


class WaitingQueue:
    """Sequences without a slot."""

    def __init__(self) -> None:
        self._sequences: dict[str, Sequence] = {}
        self._lines: dict[str, _Line] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    def __iter__(self) -> Iterator[Sequence]:
        """Each tenant's sequences in their order; the queue may change meanwhile."""
        return iter([sequence for line in self._lines.values() for _, sequence in line.ordered])

    @property
    def tenants(self) -> list[Tenant]:
        """Those of whom anything waits."""
        return [line.tenant for line in self._lines.values()]

    def of(self, tenant: Tenant) -> list[Sequence]:
        """One tenant's sequences, the next one first."""
        line = self._lines.get(tenant.name)
        return [] if line is None else [sequence for _, sequence in line.ordered]

    def get(self, request_id: str) -> Sequence | None:
        """A sequence; None if it is not there."""
        return self._sequences.get(request_id)

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence behind those of its tenant with its priority that came before; lower numbers are first."""
        self._sequences[sequence.request_id] = sequence
        line = self._lines.setdefault(sequence.tenant.name, _Line(sequence.tenant))
        line.tenant = sequence.tenant  # its limits may have changed
        insort(line.ordered, (_place(sequence), sequence), key=_place_of)

    def remove(self, request_id: str) -> Sequence | None:
        """Takes a sequence out; None if it is not there."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return None
        line = self._lines[sequence.tenant.name]
        line.ordered.pop(bisect_left(line.ordered, _place(sequence), key=_place_of))
        if not line.ordered:
            del self._lines[sequence.tenant.name]
        return sequence


def _place(sequence: Sequence) -> _Place:
    return (sequence.request.priority, sequence.arrival)


def _place_of(entry: tuple[_Place, Sequence]) -> _Place:
    return entry[0]
