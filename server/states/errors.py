"""What can go wrong with a store of states."""

from server.errors import ConflictError, NotFoundError, ServiceError, UnavailableError


class StoreError(Exception):
    """The store cannot be used; the text is a sentence for the operator."""


class StateNotFoundError(NotFoundError):
    """The one answer to ids that are unknown, expired, deleted, or another owner's."""


class PointNotFoundError(NotFoundError):
    """The state has no point of that name."""


class ResponseNotFoundError(NotFoundError):
    """The one answer to ids of responses that are unknown, expired, deleted, or another owner's."""


class StateConflictError(ConflictError):
    """The state has another head than it had."""


class StateNameTakenError(StateConflictError):
    """The owner has a state of that name."""


class StorageFullError(ServiceError):
    """The budget for states is used up, or the disk is full."""


class DiskFullError(StorageFullError):
    """The disk under the store has no room, whatever the budget says."""

    def __init__(self) -> None:
        super().__init__("the disk of the saved states is full; reading and deleting them still works")


class StoreUnavailableError(UnavailableError):
    """The store that replicas share does not answer just now. The message names no host."""

    def __init__(self, message: str = "the store of states does not answer; try again soon") -> None:
        super().__init__(message)


def owner_full(num_bytes: int, max_bytes: int) -> StorageFullError:
    """What the owner keeps would take so many bytes with what is wanted."""
    return StorageFullError(
        f"your saved states and responses would take {num_bytes:,} bytes with this one, over your limit of "
        f"{max_bytes:,} bytes; delete some (DELETE /v1/states/{{id}}, DELETE /v1/responses/{{id}}), give them less "
        "time (`ttl_s`), or do not keep answers (`store: false`, no `return_state`)"
    )


def storage_full(num_bytes: int, max_bytes: int) -> StorageFullError:
    """What all owners keep would take so many bytes with what is wanted, and the owner may keep more."""
    return StorageFullError(
        f"what all keys have saved would take {num_bytes:,} bytes with this one, over the limit of {max_bytes:,} bytes "
        "here, and you have nothing left that could make room; try again later, or ask the operator for more "
        "(--states-disk)"
    )


def state_conflict() -> StateConflictError:
    """Somebody was faster."""
    return StateConflictError("another request has updated this state meanwhile")


def name_taken(name: str) -> StateNameTakenError:
    """Somebody has it."""
    return StateNameTakenError(f"you have a state named {name!r}")


def state_not_found(state_id: str) -> StateNotFoundError:
    """Of this id."""
    return StateNotFoundError(f"there is no state {state_id[:100]!r}")


def point_not_found(point: str) -> PointNotFoundError:
    """Of this name."""
    return PointNotFoundError(f"the state has no point {point[:100]!r}")


def response_not_found(response_id: str) -> ResponseNotFoundError:
    """Of this id."""
    return ResponseNotFoundError(f"there is no response {response_id[:100]!r}")


def snapshot_gone() -> StateNotFoundError:
    """It was deleted between the moment when it was looked up and now."""
    return StateNotFoundError("the state was deleted meanwhile")
