"""What each tenant has of the slots, and who is due for the next one. Standard library only.

Weighted round robin: a tenant's load is its running sequences over its weight. The least loaded is due, and among
equals the one whose turn is longest ago. A tenant whose priorities outrank others goes by them first.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from server.engine.sequence import Sequence
from server.engine.types.requests import Tenant

QUANTUM = 512
"""Steps in a slot after which it goes to a tenant that has none."""


class SlotShares:
    """The running sequences by tenant."""

    def __init__(self) -> None:
        self._running: Counter[str] = Counter()
        self._turns: dict[str, int] = {}
        self._num_turns = 0

    def took(self, tenant: Tenant) -> None:
        """Counts a slot that a tenant was given."""
        self._running[tenant.name] += 1
        self._num_turns += 1
        self._turns[tenant.name] = self._num_turns

    def gave_back(self, tenant: Tenant) -> None:
        """Counts a slot that a tenant has no more."""
        self._running[tenant.name] -= 1
        if self._running[tenant.name] == 0:
            del self._running[tenant.name]
            if len(self._turns) > 4 * len(self._running) + 1024:  # the others' turns are as long ago as can be
                self._turns = {name: turn for name, turn in self._turns.items() if name in self._running}

    def may_run(self, tenant: Tenant) -> bool:
        """Whether its own limit leaves room for one more."""
        return tenant.max_running == 0 or self._running[tenant.name] < tenant.max_running

    def due(self, tenants: Iterable[tuple[Tenant, int]]) -> list[Tenant]:
        """Tenants and the priority of what they want next, in the order in which they are due."""
        by_turn = [
            (priority if tenant.outranks else 0, self._load(tenant), self._turns.get(tenant.name, 0), tenant)
            for tenant, priority in tenants
        ]
        return [tenant for *_, tenant in sorted(by_turn, key=lambda item: item[:3])]

    def victims(self, tenant: Tenant, running: Mapping[str, Sequence], num_steps: int) -> list[Sequence]:
        """Sequences of which one may have to give its slot to this tenant, the first one first.

        It has to if its tenant has several and would still have more for its weight than this one with one slot more,
        or this one has none at all. Who has none also gets the slot that was one sequence's for longest, once it was
        that for `QUANTUM` of the steps.
        """
        has_none = tenant.name not in self._running
        if len(self._running) == 1 - has_none:
            return []  # nobody else has any
        others = {one.tenant.name: one.tenant for one in running.values() if self._running[one.tenant.name] > 1}
        others.pop(tenant.name, None)
        heaviest = max(others.values(), key=lambda other: self._running[other.name] / other.weight, default=None)
        if heaviest and (has_none or self._running[heaviest.name] / heaviest.weight > self._load(tenant)):
            return [one for one in reversed([*running.values()]) if one.tenant.name == heaviest.name]
        if not has_none:
            return []
        settled = [one for one in running.values() if num_steps - one.num_admitted >= QUANTUM]
        return sorted(settled, key=lambda one: one.num_admitted)

    def _load(self, tenant: Tenant) -> float:
        """With one slot more than it has."""
        return (self._running[tenant.name] + 1) / tenant.weight
