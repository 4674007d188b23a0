"""One HTTP request on its way to an engine, and what comes back: plain types that cross processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

REPLICA_HEADER, RETRY_HEADER = "x-dijiang-replica", "x-dijiang-retry"


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request.

    Attributes:
        scope: of ASGI, without what belongs to one process.
        body: whole.
        keys: what an engine may have of it, the most valuable first; see `server.fleet.homes`.
        avoid: replicas that were tried and could not take it.
        to: the one replica that it is for; None: any.
        may_repeat: whether it may be sent again when a replica was lost that may have done it already.
        state_id: of the saved state that it begins from; None: it begins from none.
    """

    scope: Mapping[str, object]
    body: bytes = b""
    keys: tuple[str, ...] = ()
    avoid: frozenset[str] = field(default_factory=frozenset)
    to: str | None = None
    may_repeat: bool = True
    state_id: str | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of an answer."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]

    def header(self, name: str) -> str | None:
        """The value of a header, by its lower-case name."""
        wanted = name.encode()
        return next((value.decode("latin-1") for key, value in self.headers if key.lower() == wanted), None)
