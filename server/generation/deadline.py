"""How long a request may take, from its arrival on and in every phase: reading, compiling, waiting, generating."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server.errors import DeadlineError


@dataclass(frozen=True, slots=True)
class Deadline:
    """Of one request.

    Attributes:
        timeout_s: how long it may take; None: any time.
        at: when that is over, by the event loop's clock.
    """

    timeout_s: float | None
    at: float | None

    @classmethod
    def starting_now(cls, timeout_s: float | None) -> "Deadline":
        """So many seconds from now on; None: never."""
        return cls(timeout_s, None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s)

    def check(self) -> None:
        """Raises `DeadlineError` once it has passed."""
        if self.at is not None and asyncio.get_running_loop().time() >= self.at:
            raise self._error()

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Ends what is done within when it has passed.

        Raises:
            DeadlineError: it has.
        """
        try:
            async with asyncio.timeout_at(self.at) as limit:
                yield
        except TimeoutError:
            if limit.expired():
                raise self._error() from None
            raise

    def _error(self) -> DeadlineError:
        return DeadlineError(f"the answer was not complete after {self.timeout_s:g} s")
