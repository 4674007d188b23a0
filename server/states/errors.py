"""What can go wrong with a store of states: sentences for operators, and errors of the wire."""

from server.errors import ApiError, InvalidRequestError, NotFoundError, UnavailableError


class StoreError(Exception):
    """The store cannot be used; the text is a sentence for the operator."""


class StateConflictError(InvalidRequestError):
    """Something else has the name, or was faster."""

    def __init__(self, message: str, *, param: str, code: str) -> None:
        super().__init__(message, param=param, code=code, status=409)
        self.headers["x-should-retry"] = "false"


class StorageFullError(ApiError):
    """The budget for states is used up."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="state_storage_full", status=507, headers={"x-should-retry": "false"})


class StoreUnavailableError(UnavailableError):
    """The store that replicas share does not answer just now. The message names no host."""

    def __init__(self, message: str = "the store of states does not answer; try again soon") -> None:
        super().__init__(message, code="state_store_unavailable", retry_after_s=2)


def owner_full(num_bytes: int, max_bytes: int) -> StorageFullError:
    """What the owner keeps would take so many bytes with what is wanted."""
    return StorageFullError(
        f"your saved states and responses would take {num_bytes:,} bytes with this one, over your limit of "
        f"{max_bytes:,} bytes; delete some (DELETE /v1/states/{{id}}, DELETE /v1/responses/{{id}}), give them "
        "less time (`ttl_s`), or do not keep answers (`store: false`, no `return_state`)"
    )


def storage_full(num_bytes: int, max_bytes: int) -> StorageFullError:
    """What all owners keep would take so many bytes with what is wanted, and the owner may keep more."""
    return StorageFullError(
        f"what all keys have saved would take {num_bytes:,} bytes with this one, over the limit of {max_bytes:,} bytes "
        "here, and you have nothing left that could make room; try again later, or ask the operator for more "
        "(--states-disk)"
    )


def disk_full() -> StorageFullError:
    """The disk under the store has no room, whatever the budget says."""
    return StorageFullError("the disk of the saved states is full; reading and deleting them still works")


def state_conflict() -> StateConflictError:
    """The state has another head than it had."""
    return StateConflictError(
        "another request has updated this state meanwhile", param="state_id", code="state_conflict"
    )


def name_taken(name: str) -> StateConflictError:
    """The owner has a state of that name."""
    return StateConflictError(f"you have a state named {name!r}", param="name", code="state_name_taken")


def state_not_found(state_id: str, *, param: str | None = "state_id") -> NotFoundError:
    """The one answer to ids that are unknown, expired, deleted, or another owner's."""
    return NotFoundError(f"there is no state {state_id[:100]!r}", param=param, code="state_not_found")


def point_not_found(point: str) -> NotFoundError:
    """The state has no point of that name."""
    return NotFoundError(f"the state has no point {point[:100]!r}", param="point", code="point_not_found")


def response_not_found(response_id: str, *, param: str | None = None) -> NotFoundError:
    """The one answer to ids of responses that are unknown, expired, deleted, or another owner's."""
    return NotFoundError(f"there is no response {response_id[:100]!r}", param=param, code="response_not_found")


def snapshot_gone() -> NotFoundError:
    """It was deleted between the moment when it was looked up and now."""
    return NotFoundError("the state was deleted meanwhile", param="state_id", code="state_not_found")
