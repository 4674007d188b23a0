"""How routes get their JSON bodies and the service.

What is wrong with a body becomes a `RequestValidationError`, which the application answers with a 400. Large bodies are
parsed and validated off the event loop.
"""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Annotated, Any, get_args

import orjson
from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from server.protocol.bodies import SMALL_BYTES, parse_body
from server.service import Service


class JsonRequest(Request):
    """A request whose body was parsed already."""

    parsed: Any = None

    async def json(self) -> Any:
        """The validated body; FastAPI asks for it if there is one."""
        return self.parsed


class JsonRoute(APIRoute):
    """A route that parses bodies with `parse_body`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        model = None if self.body_field is None else _model(self.body_field.field_info.annotation)

        async def handle_json(request: Request) -> Response:
            parsed = JsonRequest(request.scope, request.receive)
            content = await parsed.body()
            if content and model is not None:
                parsed.parsed = await _parsed(content, model)
            return await handle(parsed)

        return handle_json


async def _parsed(content: bytes, model: type[BaseModel]) -> BaseModel:
    """Raises `RequestValidationError`, or what the model itself refuses."""
    parse = partial(parse_body, content, model)
    try:
        return parse() if len(content) <= SMALL_BYTES else await asyncio.to_thread(parse)
    except orjson.JSONDecodeError as error:
        problem = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "", "ctx": {"error": error.msg}}
        raise RequestValidationError([problem]) from None
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        raise RequestValidationError([{**item, "loc": ("body", *item["loc"])} for item in problems]) from None


def _model(annotation: Any) -> type[BaseModel] | None:
    """The model of a body, which may be optional."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def get_service(request: Request) -> Service:
    """The service behind the application."""
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(get_service)]
