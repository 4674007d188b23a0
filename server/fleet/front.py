"""The door of a fleet: chooses an engine for each request, tries another one where that is safe, passes the answer on.

It knows no endpoint: bodies are read only for what routing needs, and answers are the engines' own, byte for byte, but
for the end of a stream whose engine was lost.
"""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from server.errors import EngineUnavailableError, ReplicaLostError, ServiceError
from server.fleet.exchange import REPLICA_HEADER, RETRY_HEADER, Exchange, Head
from server.fleet.homes import exchange_of, homes_here, ids_in
from server.fleet.metrics import merged_metrics
from server.http.errors import HttpError, error_json, error_response
from server.http.sse import DONE, event

MAX_TRIES = 4
MAX_BODY_BYTES = 256 << 20
"""Engines have limits of their own; this one keeps the front alive."""
_SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")
_LOST = (RayActorError, RayServeException, RayError)
_log = logging.getLogger(__name__)


class Front:
    """See the module; a deployment of Ray Serve."""

    def __init__(self, engines: DeploymentHandle[Any]) -> None:
        self._engines = engines.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        """Answers one request."""
        path = request.scope["path"]
        try:
            if path == "/metrics":
                return await self._metrics(request)
            return await self._passed_on(await _read(request))
        except ServiceError as error:
            return error_response(error, path)
        except ClientDisconnect:
            return Response(status_code=499)

    async def _passed_on(self, exchange: Exchange) -> Response:
        """The answer of the first replica that takes it.

        Raises:
            ReplicaLostError: it was lost before it said anything, and may have done what must not be done twice.
            EngineUnavailableError: none of those that were tried could take it.
        """
        refusal: Response | None = None
        for _ in range(MAX_TRIES):
            chunks = self._engines.exchange.remote(exchange)
            try:
                head = await anext(chunks)
                first = await anext(chunks, b"")
            except _LOST as error:
                _log.warning("a replica was lost before it answered: %s", type(error).__name__)
                if not exchange.may_repeat:
                    raise ReplicaLostError(exchange.state_id) from error
                continue
            assert isinstance(head, Head)
            name = head.header(REPLICA_HEADER) or ""
            if head.header(RETRY_HEADER) is not None:
                refusal = _response(head, _single(first))
                exchange = replace(exchange, avoid=exchange.avoid | {name})
                continue
            if head.status < 400:
                homes_here().note(exchange.keys, name)
            return _response(head, _rest(exchange, head, name, first, chunks))
        if refusal is not None:
            return refusal
        raise EngineUnavailableError("no engine could take the request", code="engine_unavailable", retry_after_s=1)

    async def _metrics(self, request: Request) -> Response:
        """Those of every replica that answers, each line with its name."""
        exchange = await _read(request)
        texts: dict[str, bytes] = {}
        refusal: Response | None = None
        for name in sorted(homes_here().running):
            with suppress(*_LOST):
                head, *pieces = [item async for item in self._engines.exchange.remote(replace(exchange, to=name))]
                assert isinstance(head, Head)
                if head.status != 200:
                    refusal = _response(head, _single(b"".join(pieces)))
                else:
                    texts[name] = b"".join(pieces)
        if refusal is not None and not texts:
            return refusal
        return Response(merged_metrics(texts), media_type="text/plain; version=0.0.4")


async def _read(request: Request) -> Exchange:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HttpError(
                f"the body is larger than the {MAX_BODY_BYTES:,} bytes allowed here", None, "body_too_large", 413
            )
    scope = {name: request.scope[name] for name in _SCOPE if name in request.scope}
    return exchange_of(scope, bytes(body), key=request.headers.get("authorization", ""))


async def _single(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def _rest(
    exchange: Exchange, head: Head, name: str, first: bytes, chunks: AsyncIterator[Any]
) -> AsyncIterator[bytes]:
    """The body; if its replica is lost in the middle, a stream ends with the error, and the state to resume from."""
    try:
        homes_here().note(ids_in(first), name)
        yield first
        async for chunk in chunks:
            homes_here().note(ids_in(chunk), name)
            yield chunk
    except _LOST as error:
        _log.warning("a replica was lost in the middle of an answer: %s", type(error).__name__)
        endings = _endings(exchange, head)
        if not endings:
            raise
        for ending in endings:
            yield ending


def _endings(exchange: Exchange, head: Head) -> Sequence[bytes]:
    """What ends a stream that was cut; nothing for an answer that is no stream."""
    path, kind = str(exchange.scope["path"]), head.header("content-type") or ""
    error = error_json(ReplicaLostError(exchange.state_id), path)
    if kind.startswith("application/x-ndjson"):
        return [b"\n" + error + b"\n"]
    if not kind.startswith("text/event-stream"):
        return []
    if "/messages" in path or "/responses" in path:
        return [b"\n\nevent: error\n" + event(error)]
    return [b"\n\n" + event(error), DONE]


def _response(head: Head, body: AsyncIterator[bytes]) -> Response:
    """An answer whose framing is this connection's own."""
    response = StreamingResponse(body, status_code=head.status)
    hop = (b"connection", b"transfer-encoding", b"keep-alive", b"date", b"server", b"x-request-id")  # Ray sets it
    response.raw_headers = [(key, value) for key, value in head.headers if key.lower() not in hop]
    return response
