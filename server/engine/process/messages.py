"""What the service and the engine process say to each other: MessagePack, one tagged struct per message.

    service -> engine    AddRequests, AbortRequest, SuspendRequest, ResetCache, Heartbeat
    engine -> service    EngineReady | LoadFailed, then Begun, StepDone and Alive

The first thing an engine process reads is its `EngineConfig` as one line of JSON on its standard input,
which then stays open for as long as its parent lives.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby

import msgspec

from server.engine.types.requests import EngineInfo, EngineStats, GenerationRequest, TokenEvent

COMMANDS_SOCKET = "commands.sock"
EVENTS_SOCKET = "events.sock"


class AddRequests(msgspec.Struct, frozen=True, tag="add", array_like=True):
    """Take these requests in, which share a prompt and a prediction: both cross once, however many requests there are.

    Attributes:
        requests: without either.
    """

    prompt_token_ids: tuple[int, ...]
    predicted_token_ids: tuple[int, ...]
    requests: tuple[GenerationRequest, ...]

    @classmethod
    def of(cls, requests: Iterable[GenerationRequest]) -> "list[AddRequests]":
        """A message for each run of requests that share."""
        return [
            cls(prompt, predicted, tuple(replace(one, prompt_token_ids=(), predicted_token_ids=()) for one in run))
            for (prompt, predicted), run in groupby(
                requests, lambda one: (one.prompt_token_ids, one.predicted_token_ids)
            )
        ]

    def whole(self) -> list[GenerationRequest]:
        """The requests as they were, with one prompt in memory."""
        return [
            replace(one, prompt_token_ids=self.prompt_token_ids, predicted_token_ids=self.predicted_token_ids)
            for one in self.requests
        ]


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


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat", array_like=True):
    """Say `Alive` between two steps."""


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


class Begun(msgspec.Struct, frozen=True, tag="begun", array_like=True):
    """These requests have a slot from now on. Sent before their first step: should that fail, it may be their fault."""

    request_ids: list[str]


class Alive(msgspec.Struct, frozen=True, tag="alive", array_like=True):
    """The answer to a `Heartbeat`."""


class StepDone(msgspec.Struct, frozen=True, tag="step", array_like=True):
    """All events since the last message, and about once a second how the engine does."""

    events: list[TokenEvent]
    stats: EngineStats | None = None


Command = AddRequests | AbortRequest | SuspendRequest | ResetCache | Heartbeat
Report = EngineReady | LoadFailed | Begun | Alive | StepDone


def ipc_address(folder: str, socket_name: str) -> str:
    """The ZeroMQ address of a socket file in a folder."""
    return f"ipc://{folder}/{socket_name}"
