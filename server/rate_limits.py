"""How much one key may ask for in a minute: requests, and tokens of prompts and answers together.

Two buckets for each key that fill up evenly and hold a minute's worth at most. A request takes one from the first one,
and is refused while the second one is empty; the tokens that it has cost are taken when it has ended, for nobody knows
them before. So a key may run into debt by what runs at once, and has to wait until that is paid.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from server.errors import RateLimitError

MINUTE_S = 60.0
MAX_KEYS = 10_000


@dataclass(slots=True)
class _Bucket:
    """Attributes:
    capacity: what a minute brings, > 0.
    level: what is there; negative: owed.
    updated: when it was right, seconds.
    """

    capacity: int
    level: float
    updated: float

    def refill(self, now: float) -> None:
        self.level = min(self.capacity, self.level + (now - self.updated) * self.capacity / MINUTE_S)
        self.updated = now

    def wait_s(self, amount: float) -> float:
        """Until that much is there."""
        return max(0.0, (amount - self.level) * MINUTE_S / self.capacity)


class RateLimits:
    """See the module. Keys are known by any text of their own."""

    def __init__(self, requests: int, tokens: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            requests, tokens: per minute and key; 0: no limit.
            clock: seconds.
        """
        self._limits = {"requests": requests, "tokens": tokens}
        self._own: Mapping[str, Mapping[str, int | None]] = {}
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def change_own(self, limits: Mapping[str, tuple[int | None, int | None]]) -> None:
        """Keys with limits of their own, requests and tokens a minute; None: as for all."""
        self._own = {key: {"requests": requests, "tokens": tokens} for key, (requests, tokens) in limits.items()}

    def admit(self, key: str) -> None:
        """Counts a request.

        Raises:
            RateLimitError: the key has used up its minute.
        """
        requests, tokens = self._bucket(key, "requests"), self._bucket(key, "tokens")
        if tokens is not None and tokens.level < 1:
            raise _used_up("tokens", tokens, 1)
        if requests is None:
            return
        if requests.level < 1:
            raise _used_up("requests", requests, 1)
        requests.level -= 1

    def charge(self, key: str, num_tokens: int) -> None:
        """Takes what a request has cost."""
        tokens = self._bucket(key, "tokens")
        if tokens is not None:
            tokens.level -= num_tokens

    def _bucket(self, key: str, kind: str) -> _Bucket | None:
        own = self._own.get(key, {}).get(kind)
        limit = self._limits[kind] if own is None else own
        if limit == 0:
            return None
        now = self._clock()
        bucket = self._buckets.get((key, kind))
        if bucket is None or bucket.capacity != limit:
            if len(self._buckets) >= 2 * MAX_KEYS:
                self._forget_full(now)
            bucket = self._buckets[key, kind] = _Bucket(limit, limit, now)
        bucket.refill(now)
        return bucket

    def _forget_full(self, now: float) -> None:
        """A full bucket says nothing that a new one would not."""
        for place, bucket in [*self._buckets.items()]:
            bucket.refill(now)
            if bucket.level >= bucket.capacity:
                del self._buckets[place]


def _used_up(kind: str, bucket: _Bucket, amount: float) -> RateLimitError:
    wait_s = math.ceil(bucket.wait_s(amount))
    return RateLimitError(
        f"this key has used up its {bucket.capacity:,} {kind} a minute; try again in {wait_s} s", retry_after_s=wait_s
    )
