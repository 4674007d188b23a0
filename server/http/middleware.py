"""Pure ASGI middleware, outermost first: request context and log, CORS (Starlette's), keys, bodies."""

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import AuthenticationError, InternalError, OverloadedError, ServiceError
from server.http.body_budget import BodyBudget
from server.http.errors import HttpError, error_response, on_wire
from server.keys import EVERYBODY, hash_key, owner_of
from server.service import Service
from server.tracing import NO_TRACER, tracing

MAX_HEADERS = 200
MAX_HEADER_BYTES = 64 << 10
MAX_REQUEST_ID_CHARACTERS = 64
POLLED_PATHS = frozenset({"/health", "/ready", "/metrics"})
OPEN_PATHS = frozenset({"/health", "/ready"})
ADMIN_PATHS = "/admin/"
DRAIN_S = 5.0
CLOSING = {"connection": "close"}
"""The connection is not to be used again: the rest of a body may still be on its way, or the server stops."""
STATE_IMPORT_PATH = "/v1/states/import"
PROMPT_PATHS = frozenset(
    (
        *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/states", "/v1/conversations"),
        *("/v1/messages", "/v1/messages/count_tokens", "/api/chat", "/api/generate"),
        *("/tokenize", "/detokenize", "/apply-template"),
    )
)
"""Where bodies may be as large as the operator allows; elsewhere none carries a prompt."""
CONVERSATION_ITEMS = re.compile("/v1/conversations/[^/]+/items")
OLLAMA_PATHS = "/api/"
MAX_SMALL_BODY_BYTES = 256 << 10
WITHOUT_VERSION = ("/chat/completions", "/completions", "/responses", "/models", "/messages", "/conversations")
JSON_MEDIA_TYPES = ("application/json",)
STATE_MEDIA_TYPES = ("application/octet-stream", "application/vnd.safetensors")
logger = structlog.stdlib.get_logger("dijiang.http")


class RequestContextMiddleware:
    """Gives each request an id, a log line and a count; turns an unexpected exception into a clean 500."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # HEAD is GET whose body the server leaves out.
        scope = {**scope, "path": canonical_path(scope["path"])}
        scope["method"] = "GET" if scope["method"] == "HEAD" else scope["method"]
        request_id = _request_id(Headers(scope=scope))
        facts: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, facts=facts)
        status: int | None = None
        begin = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-dijiang-replica"] = self._service.options.replica
                if self._service.leaving:  # the next request of this client is for another replica
                    headers.update(CLOSING)
            await send(message)

        tracer = NO_TRACER if scope["path"] in POLLED_PATHS else self._service.tracer
        trace = tracer.request(scope["method"], scope["path"], Headers(scope=scope))
        with structlog.contextvars.bound_contextvars(request_id=request_id), tracing(trace):
            try:
                _check_headers(scope)
                _check_host(scope, self._service.options.host_names)
                await self._app(scope, receive, send_with_id)
            except ServiceError as error:
                facts["error"] = on_wire(error).code
                await error_response(error, scope["path"])(scope, receive, send_with_id)
            except Exception:
                logger.exception("request failed")
                if status is None:
                    internal = InternalError(f"internal error in request {request_id}")
                    await error_response(internal, scope["path"])(scope, receive, send_with_id)
            finally:
                route = getattr(scope.get("route"), "path", "unknown")
                trace.end(status, {"route": route, **facts})
                self._log(scope, route, status, time.perf_counter() - begin, facts)

    def _log(self, scope: Scope, route: str, status: int | None, seconds: float, facts: dict[str, Any]) -> None:
        self._service.metrics.http_requests.labels(scope["method"], route, str(status)).inc()
        is_poll = scope["path"] in POLLED_PATHS and status is not None
        logger.log(
            logging.DEBUG if is_poll else logging.INFO,
            "request",
            method=scope["method"],
            path=printable(scope["path"]),
            status=status,
            duration_ms=round(seconds * 1000, 1),
            **facts,
        )


def canonical_path(path: str) -> str:
    """The path of a route, however the base URL of a client was written: without `/v1`, with two, with a last slash."""
    if len(path) > 1 and path.endswith("/") and not path.endswith("//"):
        path = path[:-1]
    if path.startswith("/v1/v1/"):
        return path.removeprefix("/v1")
    lacks_version = any(path == root or path.startswith(f"{root}/") for root in WITHOUT_VERSION)
    return f"/v1{path}" if lacks_version else path


class AuthenticationMiddleware:
    """Lets in who knows a key, on every route but `/health`, `/ready` and the playground's (and `/metrics` by setting).

    `/admin/` has keys of its own: without any, nobody goes there, and the other keys are of no use there.
    """

    def __init__(self, app: ASGIApp, service: Service, open_paths: frozenset[str] = frozenset()) -> None:
        """`open_paths`: further ones that need no key."""
        self._app = app
        self._service = service  # whose keys may change
        metrics = frozenset() if service.options.metrics_need_key else frozenset({"/metrics"})
        self._open_paths = OPEN_PATHS | open_paths | metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            authorization = headers.get("authorization", "")
            if not authorization and "x-api-key" in headers:  # as Anthropic's clients send it
                authorization = f"Bearer {headers['x-api-key']}"
            self._check(scope["path"], authorization)
            scope["state"]["owner"] = owner = _owner(authorization) if self._service.options.key_hashes else EVERYBODY
            if owner != EVERYBODY:
                scope["state"]["facts"]["key"] = self._service.labels.of(owner)
        await self._app(scope, receive, send)

    def _check(self, path: str, authorization: str) -> None:
        if path.startswith(ADMIN_PATHS):
            if not self._service.options.admin_key_hashes:
                raise AuthenticationError("this server has no admin key, so nobody may go here (see --admin-keys)")
            _check_key(authorization, self._service.options.admin_key_hashes, kind="an admin key")
        elif self._service.options.key_hashes and path not in self._open_paths:
            _check_key(authorization, self._service.options.key_hashes, kind="a key")


def _owner(authorization: str) -> str:
    """Whose states a request may see: one owner for each key, without the key."""
    _, _, key = authorization.partition(" ")
    return owner_of(hash_key(key.strip().encode("latin-1")))


def _check_key(authorization: str, known_hashes: frozenset[bytes], *, kind: str) -> None:
    """Raises `AuthenticationError` unless the header holds a key of these hashes."""
    scheme, _, key = authorization.partition(" ")
    given = hash_key(key.strip().encode("latin-1"))  # as the bytes were on the wire
    # Every key is compared, and in constant time, so that timing tells nothing.
    matches = [hmac.compare_digest(given, known) for known in known_hashes]
    if scheme.lower() != "bearer" or not any(matches):
        raise AuthenticationError(
            f"{kind} is needed: `Authorization: Bearer KEY`" if not authorization else "the key is not valid"
        )


class BodyMiddleware:
    """Reads the body of a POST within limits of type, size and time, and hands it on in one piece."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._timeout_s = service.options.body_timeout_s
        self._budget = BodyBudget(service.options.max_arriving_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in {"POST", "PUT", "PATCH"}:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            encoding = printable(headers["content-encoding"], 40)
            raise HttpError(
                f"bodies of content encoding {encoding!r} are not read here: send them as they are",
                code="unsupported_content_encoding",
                status=415,
            )
        if headers.get("transfer-encoding", "chunked").strip().lower() != "chunked":
            encoding = printable(headers["transfer-encoding"], 40)
            raise HttpError(
                f"bodies of transfer encoding {encoding!r} are not read here: chunked alone is known",
                code="unsupported_transfer_encoding",
                status=501,
                headers=dict(CLOSING),
            )
        is_state = scope["path"] == STATE_IMPORT_PATH
        if scope["path"].startswith(OLLAMA_PATHS) and "origin" not in headers:
            scope = _with_json_type(scope)
        elif is_state or not _is_empty(headers):
            _check_content_type(headers, STATE_MEDIA_TYPES if is_state else JSON_MEDIA_TYPES)
        max_bytes = self._service.max_state_file_bytes if is_state else self._service.options.max_body_bytes
        if not (is_state or scope["path"] in PROMPT_PATHS or CONVERSATION_ITEMS.fullmatch(scope["path"])):
            max_bytes = min(max_bytes, MAX_SMALL_BODY_BYTES)
        try:
            async with asyncio.timeout(self._timeout_s):
                with self._budget.claim(scope["state"]["owner"]) as count:
                    body = await self._read(headers, receive, max_bytes, count)
        except TimeoutError:
            raise HttpError(
                f"the body did not arrive within {self._timeout_s:g} s", None, "body_timeout", 408, dict(CLOSING)
            ) from None
        if body is None:
            return  # the client left
        pending: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal pending
            message, pending = pending, None
            return message if message is not None else await receive()

        await self._app(scope, replay, send)

    async def _read(
        self, headers: Headers, receive: Receive, max_bytes: int, count: Callable[[int], None]
    ) -> bytes | None:
        length = headers.get("content-length", "")
        chunks: list[bytes] = []
        size = int(length) if length.isdigit() else 0
        if size > max_bytes:
            await self._refuse(receive, max_bytes, more=True)
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(chunk)
            if size > max_bytes:
                await self._refuse(receive, max_bytes, more=more)
            try:
                count(len(chunk))
            except OverloadedError:
                chunks.clear()
                await self._discard(receive, max_bytes, more=more)
                raise
            chunks.append(chunk)
            if not more:
                return b"".join(chunks)

    async def _refuse(self, receive: Receive, max_bytes: int, *, more: bool) -> None:
        await self._discard(receive, max_bytes, more=more)
        raise HttpError(
            f"the body is larger than the {max_bytes:,} bytes allowed here", None, "body_too_large", 413, dict(CLOSING)
        )

    async def _discard(self, receive: Receive, max_bytes: int, *, more: bool) -> None:
        """Reads what still comes for a moment: closing at once would keep clients from reading the answer."""
        budget = 4 * max_bytes
        try:
            async with asyncio.timeout(DRAIN_S):
                while more and budget > 0:
                    message = await receive()
                    budget -= len(message.get("body", b""))
                    more = message.get("more_body", False)  # false in a disconnect too
        except TimeoutError:
            pass


def _is_empty(headers: Headers) -> bool:
    """Whether no body comes, so that it needs no type: as `curl -X POST` sends to routes that need none."""
    return headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers


def _with_json_type(scope: Scope) -> Scope:
    """A request whose body is JSON whatever it says: Ollama's documented `curl` commands say it is a form.

    Not for web pages: browsers ask before they send JSON to another site, and do not before they send a form.
    """
    others = [header for header in scope["headers"] if header[0] != b"content-type"]
    return {**scope, "headers": [*others, (b"content-type", JSON_MEDIA_TYPES[0].encode())]}


def _check_content_type(headers: Headers, allowed: tuple[str, ...]) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in allowed:
        raise HttpError(f"the content type must be {' or '.join(allowed)}", code="unsupported_media_type", status=415)


def _check_headers(scope: Scope) -> None:
    headers = scope["headers"]
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        raise HttpError(
            f"more than {MAX_HEADERS} headers, or more than {MAX_HEADER_BYTES:,} bytes of them",
            code="headers_too_large",
            status=431,
        )


def _check_host(scope: Scope, names: tuple[str, ...]) -> None:
    """Refuses names that are not this server's: a page of another site may have one that leads here."""
    hosts = Headers(scope=scope).getlist("host")
    if len(hosts) > 1 or (not hosts and scope["http_version"] == "1.1"):
        raise HttpError(f"a request has one Host header, this one has {len(hosts)}", code="invalid_host")
    host = "".join(hosts).lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if not names or not name:
        return
    if not any(
        name == known
        or (known.endswith(".") and name.startswith(known) and name.replace(".", "").isdigit())
        or (known.startswith(".") and name.endswith(known))
        for known in names
    ):
        raise HttpError(
            f"this server does not answer to the host {printable(name, 100)!r} (see --allowed-hosts)",
            code="host_not_allowed",
            status=403,
        )


def _request_id(headers: Headers) -> str:
    """The client's `X-Request-Id` if it is short and printable, else a new one."""
    given = headers.get("x-request-id", "")
    if 0 < len(given) <= MAX_REQUEST_ID_CHARACTERS and all("!" <= character <= "~" for character in given):
        return given
    return uuid.uuid4().hex


def printable(text: str, limit: int = 200) -> str:
    """ASCII without control characters, so that nothing can forge a log line."""
    return ascii(text[:limit])[1:-1]
