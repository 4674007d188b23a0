"""The ASGI application: routes, middleware, and the error envelope for everything that can go wrong."""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from server.api import (
    admin,
    chat,
    completions,
    conversations,
    messages,
    models,
    ollama,
    operations,
    responses,
    states,
    tokenization,
)
from server.api.playground import playground_router
from server.errors import ServiceError
from server.http.errors import HttpError, error_response, on_wire
from server.http.middleware import (
    AuthenticationMiddleware,
    BodyMiddleware,
    RequestContextMiddleware,
    printable,
)
from server.http.sse import ClientDisconnectedError
from server.playground import load_assets
from server.protocol.wire import ErrorEnvelope, validation_error
from server.service import Service

CLIENT_CLOSED_REQUEST = 499
DESCRIPTION = "OpenAI-compatible inference for DiJiang models: linear attention with a constant-size state."


def create_app(service: Service) -> FastAPI:
    """The application around a service; the caller starts and ends the engine."""
    assets = load_assets() if service.options.playground else {}
    app = FastAPI(
        title="dijiang",
        version=service.options.version,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"default": {"model": ErrorEnvelope, "description": "Every error has this body."}},
        middleware=_middleware(service, frozenset(assets)),
        exception_handlers={
            ServiceError: _service_error,
            RequestValidationError: _validation_error,
            HTTPException: _http_error,
            ClientDisconnectedError: _client_gone,
        },
    )
    app.state.service = service
    for module in (
        completions,
        chat,
        messages,
        ollama,
        responses,
        conversations,
        states,
        models,
        tokenization,
        operations,
        admin,
    ):
        app.include_router(module.router)
    app.include_router(playground_router(assets))
    return app


def _middleware(service: Service, open_paths: frozenset[str]) -> list[Middleware]:
    layers = [
        Middleware(RequestContextMiddleware, service=service),
        Middleware(AuthenticationMiddleware, service=service, open_paths=open_paths),
        Middleware(BodyMiddleware, service=service),
    ]
    if service.options.cors_origins:
        cors: dict[str, Any] = {
            "allow_origins": service.options.cors_origins,
            "allow_methods": ["GET", "POST", "DELETE"],
            "allow_headers": ["*"],
            "expose_headers": ["x-request-id", "x-dijiang-replica", "x-dijiang-retry", "retry-after"],
            "allow_private_network": True,
        }
        layers.insert(0, Middleware(CORSMiddleware, **cors))
    return layers


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    request.state.facts["error"] = on_wire(error).code
    return error_response(error, request.url.path)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _service_error(request, validation_error(error.errors()))


async def _client_gone(_: Request, __: Exception) -> Response:
    """For the log only: nobody reads it."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown routes and wrong methods."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {printable(request.url.path)}"
    match error.status_code:
        case 404:
            problem = HttpError(f"unknown route: {asked}", code="not_found", status=404)
        case 405:
            problem = HttpError(f"wrong method: {asked}", code="method_not_allowed", status=405)
        case status:
            problem = HttpError(str(error.detail)[:200], status=status)
    problem.headers.update(error.headers or {})
    return await _service_error(request, problem)
