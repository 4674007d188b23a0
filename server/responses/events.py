"""The stream of a response: numbered events, followed while they are made or told again from what is stored."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import orjson

from server.http.sse import KEEP_ALIVE, event
from server.responses.output import Event, Item, Pieces, replayed
from server.states.store import UNFINISHED

BROKEN_OFF = frozenset(("failed", "cancelled"))
PIECES = "_pieces"
"""Where a stored response keeps in which pieces it came; not for clients, like all keys that begin so."""
_UNKNOWN_YET: Mapping[str, Any] = {
    "status": "in_progress",
    "output": [],
    "usage": None,
    "error": None,
    "completed_at": None,
    "incomplete_details": None,
}


def encoded(number: int, told: Event) -> bytes:
    """One server-sent event."""
    name, fields = told
    data = {"type": name, "sequence_number": number, **fields}
    return b"event: " + name.encode() + b"\n" + event(orjson.dumps(data))


def begun(response: Mapping[str, Any]) -> list[Event]:
    """The events before the first item."""
    first = {**response, **_UNKNOWN_YET}
    return [(name, {"response": first}) for name in ("response.created", "response.in_progress")]


def ended(response: Mapping[str, Any]) -> Event:
    """The last event."""
    return (f"response.{response['status']}", {"response": dict(response)})


def resumed(response: Mapping[str, Any], items: Sequence[Item], pieces: Pieces) -> list[Event]:
    """The events that there were of a response when it was suspended."""
    return [*begun(response), *replayed(items, pieces, was_broken_off=True)]


def suspended(num_events: int) -> tuple[int, Event]:
    """Number and content of the event that ends the streams of a response that goes on later.

    It is no event of the response's own, so it has the number of the last one of these: whoever asks for the events
    after what was read last misses none.
    """
    message = (
        "the server or its engine was stopped; the response is resumed as soon as one is free for it. Read on with "
        "GET /v1/responses/{id}?stream=true&starting_after=N, N being the last sequence number"
    )
    return num_events - 1, ("error", {"code": "server_shutdown", "message": message, "param": None})


def public(body: Mapping[str, Any]) -> dict[str, Any]:
    """A stored response as clients see it."""
    return {name: value for name, value in body.items() if not name.startswith("_")}


def with_pieces(response: Mapping[str, Any], pieces: Pieces) -> dict[str, Any]:
    """A response as it is stored."""
    return {**response, PIECES: [pieces.characters, pieces.logprobs]}


def stored_events(body: Mapping[str, Any]) -> Iterator[Event]:
    """All events of a stored response that has ended, as they were when it was made."""
    response = public(body)
    characters, logprobs = body.get(PIECES, ([], []))
    yield from begun(response)
    yield from replayed(
        response["output"], Pieces(characters, logprobs), was_broken_off=response["status"] in BROKEN_OFF
    )
    yield ended(response)


async def reported_later(bodies: AsyncIterator[Mapping[str, Any]], begin: int) -> AsyncGenerator[bytes, None]:
    """Events from number `begin` on of a response that another server makes: all at once, when it has ended.

    Args:
        bodies: the stored response, now and then, until it has ended.
    """
    async for body in bodies:
        if body["status"] in UNFINISHED:
            yield KEEP_ALIVE
            continue
        for number, told in enumerate(stored_events(body)):
            if number >= begin:
                yield encoded(number, told)
