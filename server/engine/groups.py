"""Several answers to one prompt by one prefill. Standard library only.

Of the sequences of a group the first that runs is the leader: it computes the prompt up to its last token. Then the
others get slots, as far as there are any, copies of the leader's, and each feeds the last token itself. Those that
find no slot wait on, and one of them leads the rest later. From the copy on, no sequence of a group knows of another.
"""

from server.engine.sequence import Sequence, SequenceStatus


class Groups:
    """The leaders that are still computing their prompt."""

    def __init__(self) -> None:
        self._leaders: dict[str, Sequence] = {}

    def holds(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence had better wait for its leader."""
        group = sequence.request.group
        leader = None if group is None or sequence.is_preempted else self._leaders.get(group)
        return leader is not None and leader.status is SequenceStatus.PREFILL

    def admitted(self, sequence: Sequence) -> None:
        """Lets a sequence that gets a slot lead its group, unless it has nothing to share."""
        group = sequence.request.group
        if group is None or sequence.num_fed >= _fork_point(sequence):
            return
        self._leaders[group] = sequence
        sequence.stops |= {_fork_point(sequence)}

    def ready(self) -> list[Sequence]:
        """Leaders whose slots can be copied now: all but the last token of the prompt was fed."""
        self._leaders = {
            group: leader for group, leader in self._leaders.items() if leader.status is SequenceStatus.PREFILL
        }
        return [leader for leader in self._leaders.values() if leader.num_fed == _fork_point(leader)]


def _fork_point(sequence: Sequence) -> int:
    return len(sequence.request.prompt_token_ids) - 1
