"""What is known of a key beyond that it is let in: its name, its weight, its limits. Keys themselves are not kept."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

EVERYBODY = "everybody"
"""The owner where no keys are asked for."""
OTHERS = "others"
MAX_LABELS = 100


def hash_key(key: bytes) -> bytes:
    """SHA-256; keys themselves are not kept."""
    return hashlib.sha256(key).digest()


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """One key of a keys file.

    Attributes:
        digest: SHA-256 of the key.
        name: what it is called in logs.
        is_admin: whether it is for `/admin/` alone.
        weight: its part of slots and prompt tokens, beside others of 1.
        max_running, max_queue, max_queue_tokens, rate_limit_requests, rate_limit_tokens, priority_across_keys: in place
            of the settings `max_running_per_key` and so on; None: as those say.
    """

    digest: bytes
    name: str
    is_admin: bool = False
    weight: int = 1
    max_running: int | None = None
    max_queue: int | None = None
    max_queue_tokens: int | None = None
    rate_limit_requests: int | None = None
    rate_limit_tokens: int | None = None
    priority_across_keys: bool | None = None

    @property
    def owner(self) -> str:
        """What its requests and states are known by."""
        return owner_of(self.digest)


class KeyLabels:
    """What keys are called in logs and metrics: by their name, or the begin of what they are known by.

    Of bounded number, whatever keys come and go: one more than `MAX_LABELS` is `OTHERS`.
    """

    def __init__(self) -> None:
        self._names: Mapping[str, KeyFacts] = {}
        self._known: set[str] = set()

    def learn(self, facts: Mapping[str, KeyFacts]) -> None:
        """Takes in the keys that have a name, by owner."""
        self._names = facts

    def of(self, owner: str) -> str:
        """The label of an owner."""
        if owner in self._names:
            label = self._names[owner].name
        else:
            label = owner if owner == EVERYBODY else f"key-{owner[:8]}"
        if label not in self._known:
            if len(self._known) >= MAX_LABELS:
                return OTHERS
            self._known.add(label)
        return label


def owner_of(digest: bytes) -> str:
    """One owner for each key, without the key."""
    return hashlib.sha256(b"owner of states" + digest).hexdigest()


def by_owner(facts: Iterable[KeyFacts]) -> Mapping[str, KeyFacts]:
    """The keys of clients, by owner."""
    return {one.owner: one for one in facts if not one.is_admin}
