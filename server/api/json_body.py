"""How routes get their JSON bodies and the service.

Bodies are parsed by orjson: strict UTF-8, no NaN, no lone surrogates, bounded depth. What is wrong with
one becomes a `RequestValidationError`, which the application answers with a 400.
"""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import orjson
from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute

from server.service import Service


class JsonRequest(Request):
    """A request whose body is parsed strictly."""

    async def json(self) -> Any:
        """Raises `json.JSONDecodeError` for anything that is not JSON in UTF-8."""
        return orjson.loads(await self.body())


class JsonRoute(APIRoute):
    """A route that parses bodies with `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


def get_service(request: Request) -> Service:
    """The service behind the application."""
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(get_service)]
