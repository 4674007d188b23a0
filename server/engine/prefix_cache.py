"""States after prefixes that were computed before, found by the longest prefix of a new prompt.

A state is complete at any position and of constant size, so an entry is one snapshot at an exact position: no
grid, no blocks. Rules:
    - A prefix counts only if all its tokens are equal; digests find candidates, tokens decide.
    - Entries are seen within their namespace alone: one per key and salt.
    - At least one token of a prompt is left to feed, for its logits.
    - The least recently used entries go when a tier's budget is exceeded: from the device to the host's memory,
      and from there for good.

Knows no torch: a snapshot is an opaque value of known size, and `to_host` moves one.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from server.engine.state_types import PrefixCacheStats

_TOKEN_BYTES = 4
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Hit:
    """A cached prefix.

    Attributes:
        num_tokens: its length.
        snapshot: the state after it.
    """

    num_tokens: int
    snapshot: object


@dataclass(slots=True, eq=False)
class Entry:
    """One snapshot and where it belongs."""

    namespace: str
    tokens: bytes
    digest: bytes
    snapshot: object
    on_device: bool

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // _TOKEN_BYTES


class PrefixCache:
    """See the module."""

    def __init__(
        self,
        *,
        snapshot_bytes: int,
        host_bytes: int,
        device_bytes: int = 0,
        to_host: Callable[[object], object] = lambda snapshot: snapshot,
    ) -> None:
        """
        Args:
            snapshot_bytes: size of one snapshot.
            host_bytes: budget of the host tier, tokens included; entries that do not fit are not kept.
            device_bytes: budget of the tier before it; 0: every snapshot moves to the host at once.
            to_host: moves a snapshot from the device; called when it leaves the device tier.
        """
        self._snapshot_bytes = snapshot_bytes
        self._budgets = {True: device_bytes, False: host_bytes}
        self._to_host = to_host
        self._by_namespace: dict[str, dict[int, dict[bytes, Entry]]] = {}
        self._tiers: dict[bool, OrderedDict[Entry, None]] = {True: OrderedDict(), False: OrderedDict()}
        self._used = {True: 0, False: 0}
        self._num_lookups = self._num_hits = self._num_cached_tokens = self._num_evictions = 0

    @property
    def stats(self) -> PrefixCacheStats:
        """Gauges and totals."""
        return PrefixCacheStats(
            num_entries=sum(map(len, self._tiers.values())),
            num_bytes=sum(self._used.values()),
            num_lookups=self._num_lookups,
            num_hits=self._num_hits,
            num_cached_tokens=self._num_cached_tokens,
            num_evictions=self._num_evictions,
        )

    def find(self, namespace: str, token_ids: Iterable[int], *, at_most: int) -> Hit | None:
        """The longest cached prefix of these tokens that has at most `at_most` of them."""
        self._num_lookups += 1
        by_length = self._by_namespace.get(namespace)
        if by_length is None:
            return None
        tokens = pack(token_ids)
        found: Entry | None = None
        digest, begin = hashlib.blake2b(digest_size=_DIGEST_BYTES), 0
        for length in sorted(by_length):
            end = length * _TOKEN_BYTES
            if length > at_most or end > len(tokens):
                break
            digest.update(tokens[begin:end])
            begin = end
            entry = by_length[length].get(digest.copy().digest())
            if entry is not None and entry.tokens == tokens[:end]:
                found = entry
        if found is None:
            return None
        self._tiers[found.on_device].move_to_end(found)
        self._num_hits += 1
        self._num_cached_tokens += found.num_tokens
        return Hit(found.num_tokens, found.snapshot)

    def has(self, namespace: str, token_ids: Iterable[int]) -> bool:
        """Whether exactly this prefix is cached; then it counts as used just now."""
        tokens = pack(token_ids)
        entry = self._entry(namespace, tokens)
        if entry is None:
            return False
        self._tiers[entry.on_device].move_to_end(entry)
        return True

    def put(self, namespace: str, token_ids: Iterable[int], snapshot: object) -> None:
        """Keeps the state after these tokens (at least one); replaces what is there."""
        tokens = pack(token_ids)
        self._remove_if_there(self._entry(namespace, tokens))
        entry = Entry(namespace, tokens, _digest(tokens), snapshot, on_device=True)
        by_length = self._by_namespace.setdefault(namespace, {})
        by_length.setdefault(entry.num_tokens, {})[entry.digest] = entry
        self._tiers[True][entry] = None
        self._used[True] += self._size(entry)
        self._shrink()

    def discard(self, namespace: str, token_ids: Iterable[int]) -> None:
        """Forgets every cached prefix of these tokens: their state is not to be trusted."""
        tokens = pack(token_ids)
        for length in sorted(self._by_namespace.get(namespace, {})):
            self._remove_if_there(self._entry(namespace, tokens[: length * _TOKEN_BYTES]))

    def clear(self) -> None:
        """Forgets everything."""
        for tier in self._tiers.values():
            for entry in [*tier]:
                self._remove(entry)

    def _entry(self, namespace: str, tokens: bytes) -> Entry | None:
        same_length = self._by_namespace.get(namespace, {}).get(len(tokens) // _TOKEN_BYTES, {})
        entry = same_length.get(_digest(tokens)) if same_length else None
        return entry if entry is not None and entry.tokens == tokens else None

    def _shrink(self) -> None:
        while self._used[True] > self._budgets[True]:
            self._demote(next(iter(self._tiers[True])))
        while self._used[False] > self._budgets[False]:
            self._num_evictions += 1
            self._remove(next(iter(self._tiers[False])))

    def _demote(self, entry: Entry) -> None:
        """From the device to the host."""
        del self._tiers[True][entry]
        self._used[True] -= self._size(entry)
        entry.snapshot, entry.on_device = self._to_host(entry.snapshot), False
        self._tiers[False][entry] = None
        self._used[False] += self._size(entry)

    def _remove_if_there(self, entry: Entry | None) -> None:
        if entry is not None:
            self._remove(entry)

    def _remove(self, entry: Entry) -> None:
        del self._tiers[entry.on_device][entry]
        self._used[entry.on_device] -= self._size(entry)
        by_length = self._by_namespace[entry.namespace]
        same_length = by_length[entry.num_tokens]
        del same_length[entry.digest]
        if not same_length:
            del by_length[entry.num_tokens]
        if not by_length:
            del self._by_namespace[entry.namespace]

    def _size(self, entry: Entry) -> int:
        return self._snapshot_bytes + len(entry.tokens)


def pack(token_ids: Iterable[int]) -> bytes:
    """Tokens as 4 bytes each."""
    return array("i", token_ids).tobytes()


def _digest(tokens: bytes) -> bytes:
    return hashlib.blake2b(tokens, digest_size=_DIGEST_BYTES).digest()
