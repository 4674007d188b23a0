"""Slots and queue places: who has one, who waits for one, who gives one up. No tensor, no clock, no thread.

Rules:
    - A request runs as soon as a slot is free. If several tenants wait, the one with the least for its weight is due
      (`shares`); among its own requests, priority decides, then arrival. A tenant at its own limit waits.
    - If no slot is free, a tenant that has none, or would with one more still have less than another, takes one of
      that other tenant's, if it has several; else who has none takes one that was kept for long. The sequence that was
      admitted last gives it up: its state is copied, it waits at its old place, and it goes on where it was. No token
      changes. While as many such states are kept as may be, only sequences without one give their slot up, or for a
      sequence that takes its own back.
    - At most `max_waiting` wait, the last `reserved_waiting` of them only if nothing of their tenant waits, and of no
      tenant more than its own limits say; one more is refused.
    - Prompts are begun one after the other as far as a step has tokens for them, short ones before that (`prompts`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from server.engine.fairness.prompts import Reading
from server.engine.fairness.shares import SlotShares
from server.engine.fairness.waiting import WaitingQueue
from server.engine.groups import Groups
from server.engine.sequence import Sequence
from server.engine.slots import SlotAllocator
from server.engine.types.requests import Tenant


@dataclass(slots=True)
class Moves:
    """What changes hands before a step.

    Attributes:
        preempted: sequences that lose their slot, and that slot.
        resumed: sequences that go on in another one.
        followers: sequences that begin as copies of the leader of their group, in this step.
    """

    preempted: list[tuple[Sequence, int]] = field(default_factory=list)
    resumed: list[Sequence] = field(default_factory=list)
    followers: list[Sequence] = field(default_factory=list)


class Admission:
    """See the module.

    Attributes:
        running: the sequences that hold a slot, by request, in the order in which they got it.
        waiting: the others.
        num_preemptions: slots that were taken from one tenant for another.
        num_parked: sequences that wait with a state of theirs kept elsewhere.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        max_waiting: int,
        reserved_waiting: int = 0,
        can_preempt: bool = True,
        max_parked: int | None = None,
        on_admission: Callable[[Sequence], None],
    ) -> None:
        """
        Args:
            num_slots: sequences that may run together.
            max_waiting: requests that may wait for a slot, >= 0.
            reserved_waiting: places among these for tenants of whom nothing waits.
            can_preempt: whether slots can be taken from running sequences.
            max_parked: states of these that may be kept at once; None: any number.
            on_admission: called with a sequence that gets its first slot, before its first tokens are scheduled.

        Raises:
            ValueError: fewer than no requests may wait.
        """
        if max_waiting < 0:
            raise ValueError(f"max_waiting must be 0 or more, not {max_waiting}")
        self.running: dict[str, Sequence] = {}
        self.waiting = WaitingQueue()
        self.slots = SlotAllocator(num_slots)
        self.num_preemptions = self.num_parked = 0
        self._max_waiting = max_waiting
        self._reserved_waiting = min(reserved_waiting, max_waiting)
        self._can_preempt = can_preempt
        self._max_parked = max_parked
        self._on_admission = on_admission
        self._groups = Groups()
        self._shares = SlotShares()
        self._num_arrived = 0
        self._num_steps = 0
        self._yielding: Sequence | None = None

    def refusal(self, tenant: Tenant, num_prompt_tokens: int) -> str | None:
        """Why one more request of a tenant cannot wait; None: it can."""
        mine = self.waiting.of(tenant)
        num_without_slot = len(self.waiting) - self.slots.num_free
        limit = self._max_waiting - (self._reserved_waiting if mine else 0)
        if num_without_slot >= limit:
            return f"at capacity: {len(self.running)} requests running, {len(self.waiting)} queued, limit {limit}"
        if 0 < tenant.max_waiting <= len(mine) - self.slots.num_free:
            return f"at this key's capacity: {len(mine)} requests queued, limit {tenant.max_waiting}"
        num_tokens = sum(one.num_prompt_left for one in mine)
        if mine and 0 < tenant.max_waiting_tokens < num_tokens + num_prompt_tokens:
            return f"at this key's capacity: {num_tokens:,} prompt tokens queued, limit {tenant.max_waiting_tokens:,}"
        return None

    def add(self, sequence: Sequence) -> None:
        """Lets a new sequence wait."""
        self._num_arrived += 1
        sequence.arrival = self._num_arrived
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes out a sequence that ends, and its slot back if it has one."""
        if self.waiting.remove(sequence.request_id) is None:
            del self.running[sequence.request_id]
            self._shares.gave_back(sequence.tenant)
            self.slots.free(sequence.slot)
        else:
            self.num_parked -= sequence.is_parked

    def find(self, request_id: str) -> Sequence | None:
        """A sequence that has not ended."""
        return self.running.get(request_id) or self.waiting.get(request_id)

    def fill(self, num_tokens: int) -> Moves:
        """Gives slots to whoever is due before a step that may read so many prompt tokens."""
        moves = Moves()
        self._num_steps += 1
        if self._yielding is not None:
            self._yielding.is_yielding, self._yielding = False, None
        if len(self.waiting) > 0:
            self._fork(moves)
            while self._admit_next(num_tokens, moves):
                pass
        return moves

    def _admit_next(self, num_tokens: int, moves: Moves) -> bool:
        """One more sequence, in a slot; False without a sequence or a slot."""
        if self.slots.num_free == 0 and not self._can_preempt:
            return False
        sequence = self._next(num_tokens)
        if sequence is None or (self.slots.num_free == 0 and not self._make_room(sequence, moves)):
            return False
        if sequence.is_preempted:
            moves.resumed.append(sequence)
        else:
            self._on_admission(sequence)
        self._groups.admitted(sequence)
        self._start(sequence)
        return True

    def _next(self, num_tokens: int) -> Sequence | None:
        """The sequence that is to have the next slot."""
        lines = [(tenant, self.waiting.of(tenant)) for tenant in self.waiting.tenants if self._shares.may_run(tenant)]
        heads = [(tenant, line[0].request.priority) for tenant, line in lines]
        waiting = {tenant.name: line for tenant, line in lines}
        for tenant in self._shares.due(heads) if len(heads) > 1 else [tenant for tenant, _ in heads]:
            if self.slots.num_free == 0 and not self._shares.victims(tenant, self.running, self._num_steps):
                return None  # nor for those who are due later
            reading = Reading(self.running.values(), tenant, num_tokens)
            for sequence in waiting[tenant.name]:
                if not self._groups.holds(sequence) and (sequence.num_prompt_left == 0 or reading.wants(sequence)):
                    if self.slots.num_free > 0 or self._victim(sequence) is not None:
                        return sequence
                    break
        return None

    def _make_room(self, sequence: Sequence, moves: Moves) -> bool:
        """Takes a slot from another tenant; if the sequence there has a token under way, from the next step on."""
        victim = self._victim(sequence)
        assert victim is not None
        if not victim.is_settled:
            victim.is_yielding, self._yielding = True, victim
            return False
        del self.running[victim.request_id]
        self._shares.gave_back(victim.tenant)
        slot = victim.preempt()
        self.slots.free(slot)
        self.waiting.add(victim)
        self.num_parked += victim.is_parked
        moves.preempted.append((victim, slot))
        self.num_preemptions += 1
        return True

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """Who gives a sequence its slot, within the memory for states of those who do; None: nobody."""
        victims = self._shares.victims(sequence.tenant, self.running, self._num_steps)
        is_full = self._max_parked is not None and self.num_parked - sequence.is_parked >= self._max_parked
        return next((one for one in victims if not (is_full and one.has_state)), None)

    def _fork(self, moves: Moves) -> None:
        """Gives slots to the sequences of groups whose prompt has been computed, as far as there are slots."""
        for leader in self._groups.ready():
            for sequence in self.waiting.of(leader.tenant):
                if self.slots.num_free == 0 or not self._shares.may_run(leader.tenant):
                    return
                if sequence.request.group == leader.request.group and not sequence.is_preempted:
                    sequence.fork(leader)
                    self._on_admission(sequence)
                    self._start(sequence)
                    moves.followers.append(sequence)

    def _start(self, sequence: Sequence) -> None:
        slot = self.slots.allocate()
        assert slot is not None
        self.waiting.remove(sequence.request_id)
        self.num_parked -= sequence.is_parked
        sequence.admit(slot)
        sequence.num_admitted = self._num_steps
        self.running[sequence.request_id] = sequence
        self._shares.took(sequence.tenant)
