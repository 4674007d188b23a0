"""`Idempotency-Key`: a request that is sent again, because its answer got lost, is the response that it was."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.errors import ConflictError, InvalidRequestError
from server.states.store import ResponseRecord

HEADER = "idempotency-key"
MAX_CHARACTERS = 255
_REQUEST = "_request"
"""Where a stored response keeps the digest of its request; not for clients."""


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """One key of one owner.

    Attributes:
        response_id: of the response that is made for it; only its owner can know it.
        digest: of the request.
    """

    response_id: str
    digest: str

    @classmethod
    def of(cls, headers: Mapping[str, str], *, owner: str, source: bytes) -> "IdempotencyKey | None":
        """What the headers say; None if they do not. Raises `InvalidRequestError`."""
        key = headers.get(HEADER)
        if key is None:
            return None
        if not 0 < len(key) <= MAX_CHARACTERS:
            raise InvalidRequestError(
                f"`Idempotency-Key` has {len(key)} characters; it must have 1 to {MAX_CHARACTERS}", param=HEADER
            )
        digest = hashlib.sha256(b"response of" + f"{len(owner)} {owner}{key}".encode()).hexdigest()
        return cls(f"resp_{digest[:32]}", hashlib.sha256(source).hexdigest())

    def stored(self) -> dict[str, Any]:
        """As a part of the stored response."""
        return {_REQUEST: self.digest}

    def check(self, record: ResponseRecord) -> None:
        """Raises `ConflictError` if the response is another request's."""
        if record.body.get(_REQUEST) != self.digest:
            raise ConflictError(
                "this `Idempotency-Key` was used with another request; take a new key for a new request",
                param=HEADER,
                code="idempotency_key_reused",
            )
