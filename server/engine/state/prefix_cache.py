"""States after prefixes that were computed before, found by the longest prefix of a new prompt.

A state is complete at any position and of constant size, so an entry is one snapshot at an exact position: no
grid, no blocks. Rules:
    - A prefix counts only if all its tokens are equal; digests find candidates, tokens decide.
    - Entries are seen within their namespace alone: one per key and salt.
    - At least one token of a prompt is left to feed, for its logits.
    - The least recently used entries go when a tier's budget is exceeded: from the device to the host's memory,
      from there to the disk if there is such a tier, and from the last one for good.
    - `find` never waits: it sees what is in memory. What is on the disk is brought there first, by `fetch`.

Knows no torch: a snapshot is an opaque value of known size, and `to_host` moves one.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import IntEnum
from itertools import count
from typing import Protocol

from server.engine.types.state import PrefixCacheStats

_TOKEN_BYTES = 4
_DIGEST_BYTES = 16
MAX_WRITES = 8
"""Entries on their way to the disk, which still take memory; more than these are given up instead."""


class Tier(IntEnum):
    """Where a snapshot is, in the order in which it moves on."""

    DEVICE = 0
    HOST = 1
    DISK = 2


class Disk(Protocol):
    """The last tier; see `server.engine.state.prefix_disk`."""

    def write(self, number: int, snapshot: object) -> "Future[bytes]": ...
    def read(self, number: int, digest: bytes) -> "Future[object]": ...
    def remove(self, number: int) -> None: ...


@dataclass(frozen=True, slots=True)
class CacheHit:
    """A cached prefix.

    Attributes:
        num_tokens: its length.
        snapshot: the state after it.
    """

    num_tokens: int
    snapshot: object


@dataclass(slots=True, eq=False)
class Entry:
    """One snapshot and where it belongs.

    Attributes:
        number: names its file on the disk.
        tokens: `pack`ed.
        digest: of the tokens.
        snapshot: None once it is on the disk alone.
        written: from its way to the disk on; gives the digest of the file.
    """

    number: int
    namespace: str
    tokens: bytes
    digest: bytes
    snapshot: object | None
    tier: Tier = Tier.DEVICE
    written: "Future[bytes] | None" = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // _TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class CacheRead:
    """An entry on its way from the disk to memory."""

    entry: Entry
    reading: "Future[object]"


class PrefixCache:
    """See the module."""

    def __init__(
        self,
        *,
        snapshot_bytes: int,
        host_bytes: int,
        device_bytes: int = 0,
        to_host: Callable[[object], object] = lambda snapshot: snapshot,
        disk_bytes: int = 0,
        disk: Disk | None = None,
    ) -> None:
        """
        Args:
            snapshot_bytes: size of one snapshot.
            host_bytes: budget of the host tier, tokens included; entries that do not fit are not kept.
            device_bytes: budget of the tier before it; 0: every snapshot moves to the host at once.
            to_host: moves a snapshot from the device; called when it leaves the device tier.
            disk_bytes: budget of the last tier, tokens included.
            disk: that tier; None: there is none.
        """
        self._snapshot_bytes = snapshot_bytes
        self._budgets = {Tier.DEVICE: device_bytes, Tier.HOST: host_bytes, Tier.DISK: disk_bytes}
        self._to_host = to_host
        self._disk = disk
        self._numbers = count()
        self._writes: list[Entry] = []
        self._by_namespace: dict[str, dict[int, dict[bytes, Entry]]] = {}
        self._tiers: dict[Tier, OrderedDict[Entry, None]] = {tier: OrderedDict() for tier in Tier}
        self._used = dict.fromkeys(Tier, 0)
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

    def find(self, namespace: str, token_ids: Iterable[int], *, at_most: int) -> CacheHit | None:
        """The longest cached prefix of these tokens that is in memory and has at most `at_most` of them."""
        self._num_lookups += 1
        self._settle()
        found = self._longest(namespace, pack(token_ids), at_most, in_memory=True)
        if found is None:
            return None
        assert found.snapshot is not None
        self._tiers[found.tier].move_to_end(found)
        self._num_hits += 1
        self._num_cached_tokens += found.num_tokens
        return CacheHit(found.num_tokens, found.snapshot)

    def fetch(self, namespace: str, token_ids: Iterable[int], *, at_most: int) -> CacheRead | None:
        """Begins to read the longest cached prefix if it is on the disk alone; None if there is nothing to wait for."""
        self._settle()
        found = self._longest(namespace, pack(token_ids), at_most, in_memory=False)
        if found is None or found.snapshot is not None:
            return None
        assert self._disk is not None
        assert found.written is not None
        self._tiers[found.tier].move_to_end(found)
        return CacheRead(found, self._disk.read(found.number, found.written.result()))

    def fetched(self, fetch: CacheRead) -> None:
        """Takes in what a fetch has read, which is done; an entry that could not be read is forgotten."""
        entry = fetch.entry
        if entry.tier is not Tier.DISK or self._entry(entry.namespace, entry.tokens) is not entry:
            return  # brought here by another fetch, or gone meanwhile
        if fetch.reading.exception() is not None:
            self._remove(entry)
            return
        self._leave(entry)
        self._forget_file(entry)
        self._enter(entry, Tier.HOST, fetch.reading.result())
        self._shrink()

    def has(self, namespace: str, token_ids: Iterable[int]) -> bool:
        """Whether exactly this prefix is cached; then it counts as used just now."""
        entry = self._entry(namespace, pack(token_ids))
        if entry is None:
            return False
        self._tiers[entry.tier].move_to_end(entry)
        return True

    def put(self, namespace: str, token_ids: Iterable[int], snapshot: object) -> None:
        """Keeps the state after these tokens (at least one); replaces what is there."""
        tokens = pack(token_ids)
        self._settle()
        self._remove_if_there(self._entry(namespace, tokens))
        entry = Entry(next(self._numbers), namespace, tokens, _digest(tokens), None)
        by_length = self._by_namespace.setdefault(namespace, {})
        by_length.setdefault(entry.num_tokens, {})[entry.digest] = entry
        self._enter(entry, Tier.DEVICE, snapshot)
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

    def _longest(self, namespace: str, tokens: bytes, at_most: int, *, in_memory: bool) -> Entry | None:
        by_length = self._by_namespace.get(namespace, {})
        found: Entry | None = None
        digest, begin = hashlib.blake2b(digest_size=_DIGEST_BYTES), 0
        for length in sorted(by_length):
            end = length * _TOKEN_BYTES
            if length > at_most or end > len(tokens):
                break
            digest.update(tokens[begin:end])
            begin = end
            entry = by_length[length].get(digest.copy().digest())
            is_usable = entry is not None and (entry.snapshot is not None or not in_memory)
            if entry is not None and is_usable and entry.tokens == tokens[:end]:
                found = entry
        return found

    def _entry(self, namespace: str, tokens: bytes) -> Entry | None:
        same_length = self._by_namespace.get(namespace, {}).get(len(tokens) // _TOKEN_BYTES, {})
        entry = same_length.get(_digest(tokens)) if same_length else None
        return entry if entry is not None and entry.tokens == tokens else None

    def _shrink(self) -> None:
        while self._used[Tier.DEVICE] > self._budgets[Tier.DEVICE]:
            entry = self._oldest(Tier.DEVICE)
            self._leave(entry)
            self._enter(entry, Tier.HOST, self._to_host(entry.snapshot))
        while self._used[Tier.HOST] > self._budgets[Tier.HOST]:
            self._move_to_disk(self._oldest(Tier.HOST))
        while self._used[Tier.DISK] > self._budgets[Tier.DISK]:
            self._num_evictions += 1
            self._remove(self._oldest(Tier.DISK))

    def _move_to_disk(self, entry: Entry) -> None:
        if self._disk is None or len(self._writes) >= MAX_WRITES:
            self._num_evictions += 1
            self._remove(entry)
            return
        self._leave(entry)
        self._enter(entry, Tier.DISK, entry.snapshot)
        entry.written = self._disk.write(entry.number, entry.snapshot)
        self._writes.append(entry)

    def _settle(self) -> None:
        """Gives back the memory of entries that are on the disk by now."""
        under_way = []
        for entry in self._writes:
            assert entry.written is not None
            if not entry.written.done():
                under_way.append(entry)
            elif entry.tier is Tier.DISK and self._entry(entry.namespace, entry.tokens) is entry:
                if entry.written.exception() is None:
                    entry.snapshot = None
                else:
                    self._remove(entry)
        self._writes = under_way

    def _oldest(self, tier: Tier) -> Entry:
        return next(iter(self._tiers[tier]))

    def _enter(self, entry: Entry, tier: Tier, snapshot: object) -> None:
        entry.tier, entry.snapshot = tier, snapshot
        self._tiers[tier][entry] = None
        self._used[tier] += self._size(entry)

    def _leave(self, entry: Entry) -> None:
        del self._tiers[entry.tier][entry]
        self._used[entry.tier] -= self._size(entry)

    def _remove_if_there(self, entry: Entry | None) -> None:
        if entry is not None:
            self._remove(entry)

    def _remove(self, entry: Entry) -> None:
        self._leave(entry)
        self._forget_file(entry)
        by_length = self._by_namespace[entry.namespace]
        same_length = by_length[entry.num_tokens]
        del same_length[entry.digest]
        if not same_length:
            del by_length[entry.num_tokens]
        if not by_length:
            del self._by_namespace[entry.namespace]

    def _forget_file(self, entry: Entry) -> None:
        if entry.written is not None:
            assert self._disk is not None
            self._disk.remove(entry.number)
            entry.written = None
            self._writes = [writing for writing in self._writes if writing is not entry]

    def _size(self, entry: Entry) -> int:
        return self._snapshot_bytes + len(entry.tokens)


def pack(token_ids: Iterable[int]) -> bytes:
    """Tokens as 4 bytes each."""
    return array("i", token_ids).tobytes()


def _digest(tokens: bytes) -> bytes:
    return hashlib.blake2b(tokens, digest_size=_DIGEST_BYTES).digest()
