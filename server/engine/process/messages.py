"""What the service and the engine process say to each other: MessagePack, one tagged struct per message.

    service -> engine    AddRequest, AbortRequest, SuspendRequest, ResetCache
    engine -> service    EngineReady | LoadFailed, then StepDone

The first thing an engine process reads is its `EngineConfig` as one line of JSON on its standard input,
which then stays open for as long as its parent lives.
"""

import msgspec

from server.engine.types.requests import EngineInfo, EngineStats, GenerationRequest, TokenEvent

COMMANDS_SOCKET = "commands.sock"
EVENTS_SOCKET = "events.sock"


class AddRequest(msgspec.Struct, frozen=True, tag="add", array_like=True):
    """Take this request in."""

    request: GenerationRequest


class AbortRequest(msgspec.Struct, frozen=True, tag="abort", array_like=True):
    """End this request; unknown and ended ones are ignored, for the abort may cross the end."""

    request_id: str


class SuspendRequest(msgspec.Struct, frozen=True, tag="suspend", array_like=True):
    """End this request with `SUSPENDED`, its state saved; unknown and ended ones are ignored.

    Attributes:
        save_to: file for its state; None: it is not saved.
        note: as in `StateOptions`.
        in_prompt: whether it is saved too while most of its prompt is still to be read.
    """

    request_id: str
    save_to: str | None
    note: str
    in_prompt: bool


class ResetCache(msgspec.Struct, frozen=True, tag="reset_cache", array_like=True):
    """Forget every cached prefix."""


class EngineReady(msgspec.Struct, frozen=True, tag="ready", array_like=True):
    """The model is loaded; requests may come."""

    info: EngineInfo


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed", array_like=True):
    """The model cannot be loaded; the process ends.

    Attributes:
        reason: in words, for the operator.
        is_permanent: another try cannot help, as with a damaged checkpoint.
    """

    reason: str
    is_permanent: bool


class StepDone(msgspec.Struct, frozen=True, tag="step", array_like=True):
    """All events since the last message, and about once a second how the engine does."""

    events: list[TokenEvent]
    stats: EngineStats | None = None


Command = AddRequest | AbortRequest | SuspendRequest | ResetCache
Report = EngineReady | LoadFailed | StepDone


def ipc_address(folder: str, socket_name: str) -> str:
    """The ZeroMQ address of a socket file in a folder."""
    return f"ipc://{folder}/{socket_name}"
